"""The Python API, used as a reader of docs/api.md would: the page's program runs, and nothing but the API is needed."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

import edgedetr

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
RECIPE = Path(__file__).parent / "end_to_end" / "micro.toml"

LIGHT = """
    import time
    begun = time.process_time()
    import edgedetr
    took = time.process_time() - begun
    import sys
    heavy = {"torch", "onnx", "onnxruntime", "openvino", "numpy", "click", "pydantic", "rich", "PIL"}
    print(took, *sorted(heavy & set(sys.modules)))
    dir(edgedetr), edgedetr.train, edgedetr.export, edgedetr.verify, edgedetr.Bundle
    print(*sorted(heavy & set(sys.modules)))
"""
# The program of the page, in a process where the packages of the command line cannot be imported.
WITHOUT_RICH = """
    import sys
    sys.modules.update(rich=None, click=None)
    exec(compile(open("program.py").read(), "program.py", "exec"), {"__name__": "__main__"})
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def test_importing_edgedetr_is_quick_and_imports_nothing_heavy(tmp_path):
    done = run(LIGHT, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    took, *heavy = first.split()
    assert heavy == second.split() == []
    assert float(took) < 0.1  # seconds of processor time, which other work on the machine hardly changes


def test_the_api_is_listed_and_unknown_names_are_errors():
    assert (
        {"load", "train", "export", "verify", "report", "import_model"} <= set(edgedetr.__all__) <= set(dir(edgedetr))
    )
    assert all(getattr(edgedetr, name) is not None for name in edgedetr.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        edgedetr.trian  # noqa: B018  # the access is the test


@pytest.mark.parametrize("name", ["load", "train", "export", "verify", "report", "import_model"])
def test_the_page_names_every_option_with_its_function(name):
    section = re.search(rf"^## `edgedetr\.{name}\(.*?(?=^## |\Z)", PAGE, re.M | re.S)
    assert section is not None
    for option in inspect.signature(getattr(edgedetr, name)).parameters:
        assert re.search(rf"\b{option}\b", section[0]), f"{name}: {option} is not on the page"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory as the page expects it: cells/, cells.toml, photo.jpg."""
    pytest.importorskip("torch")
    from edgedetr.data.synthetic import render

    folder = tmp_path_factory.mktemp("api")
    data = render(folder / "cells", train=16, val=4, verify=8, size=64)
    shutil.copy(RECIPE, folder / "cells.toml")
    shutil.copy(next(iter(sorted(data.glob("images/test/*")))), folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def output(folder) -> str:
    """What the page's program prints."""
    program = PAGE.split("```python\n", 1)[1].split("```", 1)[0]
    assert program.count("\n") < 30
    (folder / "program.py").write_text(program, encoding="utf-8")
    done = run(WITHOUT_RICH, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(folder, output) -> edgedetr.Bundle:
    return edgedetr.Bundle.open(folder / "runs" / "cells.bundle")


def test_the_program_of_the_page_trains_exports_verifies_reports_and_detects(output, folder, bundle):
    assert re.search(r"^torch on pytorch: AP \d", output, re.M)
    for name in ("onnx", "fp16", "int8", "int8-cpu"):
        assert re.search(rf"^{name} on onnxruntime: AP \d+\.\d, loses at most ", output, re.M)
    assert re.search(r"^not passed$", output, re.M)  # one epoch finds next to nothing, so nothing can be lost
    report = re.search(r"^report: (.+)$", output, re.M)
    assert report is not None and (folder / report[1]).is_file()
    assert re.search(r"^(circle|ring|star|square|triangle|cross) 0\.\d\d \[", output, re.M)
    assert {"model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.int8-cpu.onnx"} <= set(bundle.manifest.files)


def test_an_export_again_keeps_everything_and_says_what_is_missing(bundle):
    before = (bundle.path / "bundle.json").read_bytes()
    result = edgedetr.export(bundle.path, int8=True, engines=True)
    assert (bundle.path / "bundle.json").read_bytes() == before
    assert result.bundle.path == bundle.path
    assert bool(result.engines) != bool(result.engines_missing)  # built where TensorRT is, else a reason


def test_progress_is_called_with_the_step_and_how_far_it_is(bundle):
    seen = []
    verdict = edgedetr.verify(
        str(bundle.path), artifacts=["onnx"], threads=1, progress=lambda *progress: seen.append(progress)
    )
    assert verdict.artifacts[0].name == "torch"
    assert ("verify", 8, 8) in seen
    assert json.loads(json.dumps(verdict.to_json()))["passed"] is verdict.passed


def test_a_live_verification_gives_the_recorded_detections_again(bundle):
    recorded, live = (edgedetr.verify(bundle, artifacts=["onnx"], live=live) for live in (False, True))
    assert recorded.artifacts[0].ap == live.artifacts[0].ap
    assert recorded.artifacts[1].drop == live.artifacts[1].drop


def test_an_onnx_file_is_imported_with_options(bundle, folder, tmp_path):
    source = bundle.path / "model.onnx"
    options = edgedetr.ImportOptions(data=folder / "cells", scale=1.0)
    result = edgedetr.import_model(source, tmp_path / "mine.bundle", options)
    assert result.bundle.path == tmp_path / "mine.bundle"
    assert "images" in result.describe()
    assert result.to_json()["bundle"] == str(tmp_path / "mine.bundle")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: edgedetr.load("nowhere.bundle"), "BundleError", "nowhere.bundle"),
        (lambda: edgedetr.export("nowhere.bundle"), "BundleError", "nowhere.bundle"),
        (lambda: edgedetr.verify("nowhere.bundle"), "BundleError", "nowhere.bundle"),
        (lambda: edgedetr.report("nowhere.bundle"), "BundleError", "nowhere.bundle"),
        (lambda: edgedetr.train("nowhere", sets=["train.epohcs=3"]), "RecipeError", "did you mean 'epochs'"),
        (lambda: edgedetr.train("nowhere"), "DataError", "nowhere"),
        (lambda: edgedetr.import_model("nowhere.onnx", "out.bundle"), "EdgedetrError", "nowhere.onnx"),
    ],
)
def test_errors_are_of_one_family_and_name_what_is_wrong(call, error, message, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(edgedetr.EdgedetrError, match=message) as caught:
        call()
    assert error in {kind.__name__ for kind in type(caught.value).__mro__}


def test_calibration_images_without_anything_to_calibrate_are_an_error(bundle, folder):
    with pytest.raises(edgedetr.EdgedetrError, match="add --int8, --fp16 or --trt"):
        edgedetr.export(bundle, calib=folder / "cells")


def test_a_recipe_object_takes_no_further_values(folder):
    from edgedetr.recipe import Recipe

    with pytest.raises(edgedetr.EdgedetrError, match="put them into the Recipe"):
        edgedetr.train(folder / "cells", recipe=Recipe.load(RECIPE), sets=["train.epochs=2"])


def test_every_import_option_is_an_option_of_the_command():
    import click

    from edgedetr.cli import cli

    command = cli.get_command(click.Context(cli), "import")
    assert {item.name for item in fields(edgedetr.ImportOptions)} <= {param.name for param in command.params}
