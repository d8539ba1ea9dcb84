"""The default command: it starts from a whole published detector, here one of random weights in the hub's cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_fixtures import write_dataset
from hub_folder import COMMIT, SETS, small_rt_detr_v2, write_hub_folder

from edgedetr import cli
from edgedetr.bundle import Bundle

DETECTOR = "PekingU/rtdetr_v2_r18vd"
SHORT = ("train.epochs=1", "train.batch=8", "train.warmup_steps=1", "train.threads=1", "train.denoising=10")
EXPORT = ("quant.images=8",)


def sets(*assignments: str) -> list[str]:
    return [word for one in assignments for word in ("--set", one)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: one of COCO, and one that no detector knows."""
    root = write_dataset(tmp_path_factory.mktemp("pets") / "pets")
    for path in (root / "annotations").glob("*.json"):
        path.write_text(path.read_text().replace('"dog"', '"gadget"'))
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache with the published detector of the default recipe."""
    cache = tmp_path_factory.mktemp("hub")
    write_hub_folder(cache, DETECTOR, small_rt_detr_v2())
    return cache


@pytest.fixture
def offline(published: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(published))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return published


def test_the_default_command_starts_trains_exports_quantizes_and_verifies(
    data: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pets.bundle"
    assert cli.run(["train", "--data", str(data), "--out", str(out), *sets(*SETS, *SHORT)]) == 0
    said = capsys.readouterr().err
    assert "start: rtdetrv2-r18 (PekingU/rtdetr_v2_r18vd at cccccccc, license Apache-2.0, AP 48.1 on COCO" in said
    assert "rows by name: cat" in said and "started anew, as classes that are rare at first: gadget" in said
    assert "the cache has another commit than the table (56509617)" in said
    record = json.loads(Bundle.open(out).require("results/start.json").read_text())
    weights = offline / "models--PekingU--rtdetr_v2_r18vd" / "snapshots" / COMMIT / "model.safetensors"
    assert record["revision"] == COMMIT and record["license"] == "Apache-2.0" and record["published"] == "rtdetrv2-r18"
    assert record["files"] == {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert (record["kept_classes"], record["fresh_classes"]) == (["cat"], ["gadget"])
    assert cli.run(["export", str(out), "--int8", *sets(*EXPORT)]) == 0
    assert Bundle.open(out).has("model.int8.onnx")
    assert cli.run(["verify", str(out), "--max-drop", "100", "--threads", "1"]) in (0, 3)
    assert json.loads((out / "results" / "verify.json").read_text())["stages"]


def test_class_rows_are_kept_by_name_and_others_have_the_prior(data: Path, offline: Path) -> None:
    from edgedetr.data import layouts
    from edgedetr.recipe import Recipe
    from edgedetr.training.training_module import build_model

    classes = layouts.load(data, "train").classes
    recipe = Recipe.load(sets=[*SETS, *SHORT])
    torch.manual_seed(1)
    model = build_model(recipe, classes, load_weights=True)
    theirs = small_rt_detr_v2().state_dict()
    cat = [item.name for item in classes].index("cat")
    row = 15  # of cat among COCO's 80 classes in order
    ours, published = model.state_dict()["selector.score.weight"], theirs["model.enc_score_head.weight"]
    assert torch.equal(ours[cat], published[row])
    bias = model.state_dict()["selector.score.bias"]
    assert float(bias[1 - cat]) == pytest.approx(-4.595, abs=1e-3)  # log(0.01 / 0.99), RetinaNet's prior


def test_none_starts_from_the_backbone_and_random_from_nothing(data: Path, offline: Path, tmp_path: Path) -> None:
    from edgedetr.recipe import Recipe

    alone = Recipe.load(sets=['train.start="none"'])
    assert (alone.train.start, alone.model.config.backbone_weights) == ("", "auto")
    nothing = Recipe.load(sets=["model.start=random"])
    config = nothing.model.config
    assert (nothing.train.start, config.backbone_weights, config.backbone_norm) == ("", "random", "trainable")
    assert nothing.train.backbone_lr_factor == 1.0
    assert Recipe.load(sets=["model.backbone_weights=random"]).train.start == ""
    words = [
        "train",
        "--data",
        str(data),
        "--start",
        "random",
        "--out",
        str(tmp_path / "r.bundle"),
        *sets(*SETS, *SHORT),
    ]
    assert cli.run(words) == 0
    assert not Bundle.open(tmp_path / "r.bundle").has("results/start.json")


REFUSED = {
    "a name that nobody published": (["--start", "rtdetrv2_r18"], "did you mean 'rtdetrv2-r18'.*--published"),
    "a license that was not accepted": (["--start", "rfdetr-xlarge"], "--accept-license PML-1.0"),
    "another model": (["--start", "detr-r50", "--model", "rtdetr-r18"], "is a detr, and the recipe's model a rt_detr"),
    "another size": (
        sets("model.decoder_layers=3"),
        r"missing \(34\): .*decoder.layers.2.*--start none; or .*: --model rtdetr-r18",
    ),
    "a published detector without a recipe, as a recipe": (
        ["--model", "rtdetr-r101"],
        "edgedetr import rtdetr-r101 --out B, then edgedetr train --recipe B/recipe.toml --start B",
    ),
    "other pixels": (sets("model.mean=[0.5, 0.5, 0.5]"), r"--set model.mean=\[0.0, 0.0, 0.0\]"),
    "a file that only a person can download": (
        ["--start", "deim-rtdetrv2-r18"],
        r"open https://drive.google.com/\S+, save its weight file into \S+files--deim-rtdetrv2-r18",
    ),
    "no network": (["--start", "rtdetrv2-r50", "--model", "rtdetr-r18"], r"edgedetr fetch rtdetrv2-r50 --to DIR; then"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_started_from_is_one_error(
    case: str, data: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    out = tmp_path / "b"
    assert cli.run(["train", "--data", str(data), "--out", str(out), *sets(*SETS, *SHORT), *words]) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and not (out / "weights.safetensors").exists()


def test_another_number_of_classes_than_published_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    write_hub_folder(tmp_path / "hub", DETECTOR, small_rt_detr_v2(labels=3))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.run(["train", "--data", str(data), "--out", str(tmp_path / "b"), *sets(*SETS, *SHORT)]) == 1
    assert "its class head has 3 rows, and that of rtdetrv2-r18 80" in capsys.readouterr().err


def test_an_offline_machine_is_told_in_one_message_within_seconds(data: Path, tmp_path: Path) -> None:
    """In a process of its own, where every look-up of a name fails: the hub's client would try again for a minute."""
    library = build_network_log(tmp_path)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "NETWORK_LOG": str(tmp_path / "log"),
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment.pop(name, None)
    code = "import torch, edgedetr.training.train, time\nfrom edgedetr import cli\nbegun = time.process_time()\n"
    code += f"code = cli.run(['train', '--data', {str(data)!r}, '--out', {str(tmp_path / 'b')!r}])\n"
    code += "print(code, time.process_time() - begun)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    code, seconds = done.stdout.split()
    assert int(code) == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "recipe:" not in line and "bundle:" not in line]
    assert len(errors) == 1, done.stderr
    assert "edgedetr fetch rtdetrv2-r18 --to DIR; then copy what is in DIR into" in errors[0]
    assert str(tmp_path / "home" / "hub") in errors[0]
    asked = (tmp_path / "log").read_text().splitlines()
    assert len(asked) == 1 and "huggingface.co" in asked[0], "asked once"
    # Of the CPU, whatever else the machine does; measured 0.7, and 3.2 before them for imports.
    assert float(seconds) < 5


def build_network_log(folder: Path) -> Path:
    """tests/network_log.c as a library; a skip without a compiler."""
    source, library = Path(__file__).resolve().parents[1] / "network_log.c", folder / "network_log.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as reason:
        pytest.skip(f"needs a C compiler: {reason}")
    return library
