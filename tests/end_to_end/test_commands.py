"""End to end by the command line: train, export, quantize, verify, report, predict, on a few rendered images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.data.synthetic import render

pytest.importorskip("torch")
RECIPE = Path(__file__).with_name("micro.toml")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("scenes") / "set", train=16, val=4, verify=10, size=64, seed=3)


@pytest.fixture(scope="module")
def bundle(data, tmp_path_factory) -> Path:
    """Made by the commands alone, as a reader would."""
    out = tmp_path_factory.mktemp("runs") / "micro.bundle"
    assert cli.run(["train", "--data", str(data), "--recipe", str(RECIPE), "--out", str(out)]) == 0
    assert cli.run(["export", str(out)]) == 0
    assert not Bundle.open(out).has("model.int8.onnx")
    assert cli.run(["export", str(out), "--int8"]) == 0
    return out


@pytest.fixture(scope="module")
def verdict(bundle) -> dict:
    # After one epoch the micro model finds nothing, so that nothing passes at any tolerance. That a model that does
    # find something passes, with exit code 0, is held by tests/evaluation/test_verify.py.
    assert cli.run(["verify", str(bundle), "--max-drop", "100"]) == 3
    return json.loads((bundle / "results" / "verify.json").read_text(encoding="utf-8"))


def test_the_bundle_holds_every_artifact(bundle):
    opened = Bundle.open(bundle)
    for name in (
        "recipe.toml",
        "weights.safetensors",
        "reference.npz",
        "model.onnx",
        "ranges.json",
        "model.int8.onnx",
        "model.int8-cpu.onnx",
    ):
        assert opened.require(name).stat().st_size > 0
    assert not list(bundle.rglob("*.tmp"))


def test_training_onto_a_finished_bundle_is_refused(data, bundle, capsys):
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert cli.run(["train", "--data", str(data), "--recipe", str(RECIPE), "--out", str(bundle)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_exporting_again_changes_nothing(bundle):
    before = (bundle / "bundle.json").read_bytes()
    assert cli.run(["export", str(bundle), "--int8"]) == 0
    assert (bundle / "bundle.json").read_bytes() == before


def test_verify_prints_the_documented_json(bundle, verdict, capsys):
    assert cli.run(["verify", str(bundle), "--max-drop", "100", "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"] is False and "NOTHING TO LOSE" in captured.err
    assert set(found) == {"passed", "budget", "certifiable", "stages"}
    assert found["budget"] == 100
    keys = {"name", "backend", "passed", "ap", "ap50", "drop", "drop_upper95", "p50_ms", "p99_ms", "size_mb"}
    assert all(keys <= set(artifact) for artifact in found["stages"])
    assert {(artifact["name"], artifact["backend"]) for artifact in found["stages"]} >= {
        ("torch", "pytorch"),
        ("onnx", "onnxruntime"),
        ("int8", "onnxruntime"),
        ("int8-cpu", "onnxruntime"),
    }
    # The same bytes, the same seed: only the times differ.
    for one, other in zip(found["stages"], verdict["stages"]):
        assert {k: v for k, v in one.items() if not k.endswith("_ms")} == {
            k: v for k, v in other.items() if not k.endswith("_ms")
        }


def test_a_live_reference_gives_the_recorded_accuracy(bundle, verdict, capsys):
    assert cli.run(["verify", str(bundle), "--max-drop", "100", "--live", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["stages"][0]["ap"] == pytest.approx(verdict["stages"][0]["ap"], abs=1e-9)


@pytest.mark.parametrize("command", ["eval", "val"])
def test_eval_agrees_with_verify(command, bundle, verdict, capsys):
    assert cli.run([command, str(bundle), "--stage", "int8-cpu", "--json"]) == 0
    recorded = next(artifact for artifact in verdict["stages"] if artifact["name"] == "int8-cpu")
    assert json.loads(capsys.readouterr().out)["ap"] == pytest.approx(recorded["ap"], abs=1e-9)


def test_bench_times_every_artifact(bundle, capsys):
    assert cli.run(["bench", str(bundle), "--rounds", "2", "--threads", "1", "--json"]) == 0
    timings = json.loads(capsys.readouterr().out)
    assert {t["name"] for t in timings} == {"onnx", "int8", "int8-cpu"}
    assert all(0 < t["p50_ms"] <= t["p99_ms"] for t in timings)


def test_report_names_every_artifact(bundle, verdict, capsys):
    assert cli.run(["report", str(bundle)]) == 0
    page = (bundle / "report" / "index.html").read_text(encoding="utf-8")
    for artifact in verdict["stages"]:
        assert f"<td>{artifact['name']}</td><td>{artifact['backend']}</td>" in page


def test_predict_writes_json_lines_and_images(bundle, data, tmp_path, capsys):
    paths = sorted((data / "images" / "test").iterdir())[:2]
    words = ["predict", str(bundle), *map(str, paths), "--out", str(tmp_path / "drawn"), "--conf", "0"]
    assert cli.run(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["source"]).name for line in lines] == [path.name for path in paths]
    for line in lines:
        assert (line["height"], line["width"]) == (64, 64)
        boxes = np.array([found["xyxy"] for found in line["detections"]])
        assert boxes.min() >= 0
        assert boxes.max() <= 64
        assert {found["category_id"] for found in line["detections"]} <= {1, 2, 3, 4, 5, 6}
        assert Image.open(tmp_path / "drawn" / Path(line["source"]).with_suffix(".jpg").name).size == (64, 64)


def test_predict_says_what_is_wrong_with_a_source(bundle, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert cli.run(["predict", str(bundle), str(tmp_path / "broken.jpg")]) == 1
    assert "broken.jpg" in capsys.readouterr().err
    assert cli.run(["predict", str(bundle), str(tmp_path / "none.jpg")]) == 1
    assert "none.jpg" in capsys.readouterr().err


def test_calibrating_on_the_verify_split_is_refused(bundle, data, tmp_path, capsys):
    assert cli.run(["export", str(bundle), "--int8", "--calib", str(data / "images" / "test")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_changed_verify_image_is_noticed(bundle, data, tmp_path, capsys):
    import shutil

    shutil.copytree(data, tmp_path / "copy")
    path = sorted((tmp_path / "copy" / "images" / "test").iterdir())[0]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    assert cli.run(["verify", str(bundle), "--data", str(tmp_path / "copy")]) == 1
    assert path.name in capsys.readouterr().err


def test_the_demonstration_runs_and_goes_on_where_it_was(tmp_path):
    from edgedetr import demo
    from edgedetr.recipe import Recipe

    scenes = demo.Scenes(train=8, val=2, verify=6, size=64)
    recipe = Recipe.load(RECIPE, sets=["verify.budget=100"])
    first = demo.run(tmp_path / "demo.bundle", recipe=recipe, scenes=scenes)
    assert list(first.seconds) == ["render", "train", "export and quantize", "verify", "report"]
    assert Bundle.open(tmp_path / "demo.bundle").manifest.synthetic
    assert "synthetic data" in first.report.read_text(encoding="utf-8")
    weights = (tmp_path / "demo.bundle" / "weights.safetensors").read_bytes()
    again = demo.run(tmp_path / "demo.bundle", recipe=recipe, scenes=scenes)
    assert (tmp_path / "demo.bundle" / "weights.safetensors").read_bytes() == weights
    assert [a.ap for a in again.verdict.artifacts] == [a.ap for a in first.verdict.artifacts]


def test_the_demonstration_touches_no_folder_of_somebody_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert cli.run(["demo", "--out", "mine", "--fresh"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
