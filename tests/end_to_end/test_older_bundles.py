"""A bundle that version 0.1 wrote (tests/fixtures/bundle-0.1) keeps loading, and keeps its meaning.

Made by `edgedetr train` (rt_detr, 64 px, 0.08M parameters, 400 epochs), `export`, `export --int8 --trt` and `verify` on
rendered scenes (tests/fixtures/scenes-0.1), before any later change of format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgedetr import cli
from edgedetr.bundle import Bundle

FIXTURES = Path(__file__).parents[1] / "fixtures"
DATA = FIXTURES / "scenes-0.1"


@pytest.fixture
def bundle(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "bundle-0.1", tmp_path / "old.bundle"))


def test_every_file_of_an_older_bundle_is_still_good(bundle):
    opened = Bundle.open(bundle)
    assert {name for name in opened.manifest.files if not opened.has(name)} == set()


def test_an_older_bundle_verifies_with_the_figures_it_was_recorded_with(bundle, capsys):
    recorded = json.loads((bundle / "results" / "verify.json").read_text(encoding="utf-8"))
    words = ["verify", str(bundle), "--data", str(DATA), "--max-drop", "100", "--backend", "onnxruntime", "--json"]
    assert cli.run(words) in (0, 3)  # 3: a model of AP 0.1 may be refused a verdict; the figures stay
    artifacts = {artifact["name"]: artifact for artifact in json.loads(capsys.readouterr().out)["stages"]}
    assert {"torch", "onnx", "fp16", "int8", "int8-cpu"} <= set(artifacts)
    for old in recorded["stages"]:  # the float ones: rounding to INT8 differs between CPUs, and AP is low here
        if old["name"] in ("torch", "onnx"):
            assert artifacts[old["name"]]["ap"] == pytest.approx(old["ap"], abs=1e-6)


def test_an_older_bundle_predicts(bundle, capsys):
    image = sorted((DATA / "images" / "test").iterdir())[0]
    assert cli.run(["predict", str(bundle), str(image), "--conf", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["detections"]


def test_an_older_checkpoint_resumes_with_the_weights_it_held(bundle):
    pytest.importorskip("torch")
    before = (bundle / "weights.safetensors").read_bytes()
    # All 400 epochs are done, so that a resume has nothing left to train.
    assert (
        cli.run(
            ["train", "--data", str(DATA), "--out", str(bundle), "--resume", "--recipe", str(bundle / "recipe.toml")]
        )
        == 0
    )
    assert (bundle / "weights.safetensors").read_bytes() == before
