"""The bundle keeps what it has, sees damage and staleness, and never shows a half-written file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import BundleError
from edgedetr.storage.atomic import atomic_write


@pytest.fixture
def manifest():
    return Manifest(
        model="rt_detr",
        classes=(ClassInfo(0, 1, "cell"), ClassInfo(1, 7, "größer")),
        input=InputContract(320, 256),
        output=OutputContract("sigmoid", 100),
        budget=0.5,
    )


@pytest.fixture
def bundle(tmp_path, manifest):
    return Bundle.create(tmp_path / "b.bundle", manifest)


def put(bundle, name, text, made_from=()):
    with bundle.add(name, stage="test", made_from=made_from) as path:
        path.write_text(text)


def test_what_was_written_is_read_back_equal(bundle):
    put(bundle, "weights.safetensors", "w")
    put(bundle, "results/verify.json", "{}", made_from=["weights.safetensors"])
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert bundle.require("results/verify.json").read_text() == "{}"


def test_a_missing_file_names_the_command_that_makes_it(bundle):
    with pytest.raises(BundleError, match=r"model.onnx has not been made yet; run: edgedetr export .*b\.bundle"):
        bundle.require("model.onnx")


def test_an_edited_file_is_refused(bundle):
    put(bundle, "model.onnx", "graph")
    (bundle.path / "model.onnx").write_text("Graph")  # same length: only the digest differs
    with pytest.raises(BundleError, match="damaged or edited"):
        bundle.require("model.onnx")


def test_a_file_made_from_something_that_changed_is_stale(bundle):
    put(bundle, "ranges.json", "1")
    put(bundle, "model.int8.onnx", "q", made_from=["ranges.json"])
    assert bundle.has("model.int8.onnx")
    put(bundle, "ranges.json", "2")
    message = r"made from ranges\.json [0-9a-f]{8}, which is now [0-9a-f]{8}; run: edgedetr export"
    with pytest.raises(BundleError, match=message):
        bundle.require("model.int8.onnx")


def test_an_exception_while_adding_leaves_the_old_file_and_no_litter(bundle):
    put(bundle, "model.onnx", "old")
    with pytest.raises(RuntimeError), bundle.add("model.onnx", stage="test") as path:
        path.write_text("half")
        raise RuntimeError
    assert bundle.require("model.onnx").read_text() == "old"
    assert sorted(p.name for p in bundle.path.iterdir()) == ["bundle.json", "model.onnx"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_names_that_leave_the_bundle_are_refused(bundle, name):
    with pytest.raises(BundleError, match="outside the bundle"), bundle.add(name, stage="test"):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw | {"schema": 99},
        lambda raw: raw | {"color": 1},
        lambda raw: raw | {"classes": [{"index": 1, "category_id": 1, "name": "x"}]},
        lambda raw: raw | {"input": {"height": -1, "width": 5}},
        lambda raw: raw | {"input": {"height": 5, "width": 5, "resize": "crop"}},
        lambda raw: raw | {"files": {"../../etc/passwd": {"sha256": "0", "size": 1, "stage": "x"}}},
        lambda raw: {k: v for k, v in raw.items() if k != "model"},
        lambda raw: [raw],
    ],
)
def test_a_damaged_manifest_is_one_clear_error(bundle, damage):
    where = bundle.path / "bundle.json"
    where.write_text(json.dumps(damage(json.loads(where.read_text()))))
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_manifest_is_one_clear_error(bundle, fraction):
    where = bundle.path / "bundle.json"
    text = where.read_text()
    where.write_text(text[: int(len(text) * fraction)])
    with pytest.raises(BundleError, match="bundle.json"):
        Bundle.open(bundle.path)


def test_a_directory_that_is_no_bundle_says_how_to_make_one(tmp_path):
    with pytest.raises(BundleError, match="edgedetr train"):
        Bundle.open(tmp_path)


def test_creating_over_an_existing_bundle_keeps_its_files(bundle, manifest):
    put(bundle, "model.onnx", "graph")
    assert Bundle.create(bundle.path, manifest).has("model.onnx")


@pytest.mark.parametrize("name", ["recipe.toml", "weights.safetensors", "model.onnx", "thesis.txt", "images"])
def test_a_folder_of_somebody_elses_is_not_made_a_bundle(tmp_path, manifest, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    message = f"mine holds '{name}' and is not a bundle; .* choose another --out"
    with pytest.raises(BundleError, match=message):
        Bundle.create(tmp_path / "mine", manifest)
    with pytest.raises(BundleError, match=message), Bundle.training(tmp_path / "mine"):
        pass
    assert [(path.name, path.read_text()) for path in (tmp_path / "mine").iterdir()] == [(name, "years of work")]


def test_a_folder_in_which_a_training_began_becomes_a_bundle(tmp_path, manifest):
    (tmp_path / "b.bundle" / "train").mkdir(parents=True)
    with Bundle.training(tmp_path / "b.bundle"):
        put(Bundle.create(tmp_path / "b.bundle", manifest), "recipe.toml", "x")
    assert Bundle.open(tmp_path / "b.bundle").has("recipe.toml")


WRITER = """
import sys
from pathlib import Path
from edgedetr.storage.atomic import atomic_write
n = 0
while True:
    n += 1
    with atomic_write(Path(sys.argv[1])) as path:
        path.write_bytes(bytes([n % 256]) * 300_000)
    print(n, flush=True)
"""


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11])
def test_a_file_killed_while_being_written_is_whole(tmp_path, delay):
    target = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    data = target.read_bytes()
    assert len(data) == 300_000 and len(set(data)) == 1


def test_a_read_only_directory_is_an_error_that_leaves_the_file(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    target = tmp_path / "file"
    target.write_text("old")
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError), atomic_write(target) as path:
        path.write_text("new")
    assert target.read_text() == "old"
