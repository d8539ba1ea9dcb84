"""The verdict over a labeled set with artifacts that lose a known amount, and over sets that do not fit."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.data import images, layouts
from edgedetr.errors import BundleError, DataError, MissingDependency, RecipeError, UsageError
from edgedetr.evaluation import artifacts_run, judge
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.realized_precision import RealizedPrecision
from edgedetr.evaluation.reference import Reference, load_detections
from edgedetr.evaluation.verdict import Verdict
from edgedetr.evaluation.verify import evaluate_artifact, verify
from edgedetr.reporting.tables import integer_lines, verdict_sentence, verdict_word
from edgedetr.runtime import load
from edgedetr.runtime.backends import base, openvino
from edgedetr.runtime.backends.base import MADE_BY, RawOutputs
from edgedetr.runtime.backends.openvino import OpenVinoRunner
from edgedetr.runtime.cure_record import Cure, recorded

KEYS = {"name", "backend", "passed", "ap", "ap50", "drop", "drop_upper95", "p50_ms", "p99_ms", "size_mb"}
GOOD, SLIGHTLY, BAD = (6.0, 6.0), (5.9, 6.0), (0.2, 6.0)  # how much query 0 likes red and blue


def with_reference(bundle: Bundle, data: Path) -> Bundle:
    """reference.npz from the float graph, which plays torch's part."""
    dataset, detector = layouts.load(data, "test"), load(bundle, stage="onnx", backend="onnxruntime")
    found = {s.image_id: detector([images.decode(s.path)])[0] for s in dataset.samples}
    with bundle.add("reference.npz", stage="export") as path:
        Reference.of(dataset, found).save(path)
    return bundle


@pytest.fixture
def good(make_bundle, colors) -> Bundle:
    return with_reference(make_bundle(onnx=GOOD, int8=SLIGHTLY, int8_cpu=SLIGHTLY), colors)


@pytest.fixture
def bad(make_bundle, colors) -> Bundle:
    return with_reference(make_bundle(onnx=GOOD, int8=GOOD, int8_cpu=BAD), colors)


def test_sound_artifacts_pass_and_the_json_has_the_documented_form(good):
    result = verify(good.path, threads=1)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) == {"passed", "budget", "certifiable", "stages"}
    assert document["passed"] is True
    assert document["budget"] == 1.0
    assert [(s["name"], s["backend"]) for s in document["stages"]] == [
        ("torch", "pytorch"),
        ("onnx", "onnxruntime"),
        ("int8", "onnxruntime"),
        ("int8", "openvino"),
        ("int8-cpu", "onnxruntime"),
        ("int8-cpu", "openvino"),
    ]
    for artifact in document["stages"]:
        assert set(artifact) >= KEYS
        assert artifact["ap"] == pytest.approx(100)
        assert artifact["drop"] == pytest.approx(0)
        assert artifact["images"] == 24
        assert artifact["note"] == ""
        # ONNX Runtime runs a simulation of what is made for TensorRT: its own reference run, and not timed.
        simulated = (artifact["name"], artifact["backend"]) == ("int8", "onnxruntime")
        assert (artifact["p50_ms"] is None) == (simulated or artifact["name"] == "torch")
        if artifact["name"] != "torch":
            assert artifact["parity"]["matched"] == 1.0
        if artifact["name"] != "torch" and not simulated:
            assert 0 < artifact["p50_ms"] <= artifact["p99_ms"]
            assert artifact["oracle"]["matched"] == 1.0
    assert document["stages"][0]["p50_ms"] is None
    assert json.loads((good.path / "results" / "verify.json").read_text()) == document


def test_the_command_exits_with_0_where_all_pass_and_with_3_where_one_does_not(good, tiny_graph, capsys):
    words = ["verify", str(good.path), "--threads", "1", "--backend", "onnxruntime", "--json"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] and "\nPASSED: no file loses more" in captured.err
    with good.add("model.int8-cpu.onnx", stage="export") as path:  # boxes where no object is
        tiny_graph.write(path, np.ones((3, 6)), np.zeros((3, 2)), boxes=np.full((3, 4), [0.9, 0.1, 0.1, 0.1]))
    assert cli.run(words) == 3
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["passed"]
    assert "\nNOT PASSED: int8-cpu on onnxruntime loses 100.00 AP" in captured.err


def test_a_cpu_that_saturates_int8_judges_no_file_by_openvino_unless_asked(good, monkeypatch, caplog):
    monkeypatch.setattr(artifacts_run, "int8_saturates", lambda: True)
    usual = [(s.name, s.backend) for s in verify(good, threads=1).artifacts]
    assert usual == [
        ("torch", "pytorch"),
        ("onnx", "onnxruntime"),
        ("int8", "onnxruntime"),
        ("int8-cpu", "onnxruntime"),
        ("int8-cpu", "openvino"),
    ]
    assert "saturate" in caplog.text and "--backend openvino" in caplog.text
    asked = [(s.name, s.backend) for s in verify(good, threads=1, backends=["openvino"]).artifacts]
    assert asked == [("torch", "pytorch"), ("int8", "openvino"), ("int8-cpu", "openvino")]


def test_an_artifact_that_loses_points_is_the_one_that_fails(bad):
    result = verify(bad, threads=1)
    assert not result.passed
    assert [s.passed for s in result.artifacts] == [True, True, True, True, False, False]
    lost = result.artifacts[-1]
    detector = load(bad, stage="int8-cpu", backend="onnxruntime")
    dataset = layouts.load(bad.manifest.data.path, "test")
    alone = evaluate(dataset, {s.image_id: detector([images.decode(s.path)])[0] for s in dataset.samples})
    assert lost.ap == pytest.approx(alone.ap)
    assert lost.drop == pytest.approx(100 - alone.ap)
    assert lost.drop > 10
    assert lost.drop_lower95 <= lost.drop <= lost.drop_upper95 == result.certifiable
    assert lost.per_class["blue"] == pytest.approx(100)
    assert lost.per_class["red"] < 80
    assert lost.note == ""  # the graph itself is bad, and its backend computes it faithfully


def test_another_quantizers_file_that_loses_all_is_measured_and_decides_nothing(make_bundle, colors, tiny_graph):
    bundle = with_reference(make_bundle(onnx=GOOD, int8_cpu=SLIGHTLY, nncf=BAD), colors)
    result = verify(bundle.path, threads=1)
    peers = [row for row in result.artifacts if row.quantizer]
    assert [(row.name, row.quantizer, row.backend) for row in peers] == [
        ("int8-nncf", "nncf", "onnxruntime"),
        ("int8-nncf", "nncf", "openvino"),
    ]
    assert all(row.drop > 20 and not row.passed for row in peers)
    assert result.passed and result.certifiable == pytest.approx(0)
    words = [verdict_word(row, 1.0) for row in result.artifacts]
    assert words == ["reference", *["within"] * 3, *["peer: beyond"] * 2]
    assert verdict_sentence(result).startswith("PASSED: no file loses more than 0.00 AP")
    assert Verdict.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_detections_of_every_artifact_are_kept_for_the_report(bad):
    result = verify(bad, threads=1)
    truth = Reference.load(bad.require("reference.npz")).truth
    for artifact in result.artifacts[1:]:
        found = load_detections(
            bad.require(f"results/detections-{artifact.name}-{artifact.backend}.npz"), truth.classes
        )
        assert evaluate(truth, found).ap == pytest.approx(artifact.ap)


def test_a_tolerance_of_the_certifiable_size_passes_and_a_smaller_one_does_not(bad):
    needed = verify(bad, threads=1).certifiable
    assert verify(bad, threads=1, max_drop=needed).passed
    assert not verify(bad, threads=1, max_drop=needed - 0.01).passed
    assert verify(bad, threads=1, max_drop=needed).tolerance == needed


def test_a_reference_with_nothing_to_lose_does_not_pass_though_no_artifact_loses_anything(good):
    result = verify(good, threads=1, max_drop=100, artifacts=["onnx"])
    assert [s.drop for s in result.artifacts] == [0, 0]
    assert not result.passed and not any(s.passed for s in result.artifacts)
    assert "AP 100.00, no more than the tolerance of 100" in result.artifacts[0].note


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_model_that_finds_nothing_does_not_pass_whatever_the_tolerance(good, colors, tiny_graph, tolerance, capsys):
    for name in ("model.onnx", "model.int8.onnx", "model.int8-cpu.onnx"):
        with good.add(name, stage="export") as path:  # boxes where no object is
            tiny_graph.write(path, np.ones((3, 6)), np.zeros((3, 2)), boxes=np.full((3, 4), [0.9, 0.1, 0.1, 0.1]))
    bundle = with_reference(good, colors)
    result = verify(bundle, threads=1, max_drop=tolerance)
    assert [s.drop for s in result.artifacts] == [0] * len(result.artifacts)
    assert not result.passed and not any(s.passed for s in result.artifacts)
    assert cli.run(["verify", str(bundle.path), "--max-drop", str(tolerance), "--threads", "1"]) == 3
    document = capsys.readouterr().err
    assert "NOT PASSED, NOTHING TO LOSE: the model itself reaches AP 0" in document
    assert "within" not in document
    recorded = json.loads((bundle.path / "results" / "verify.json").read_text())
    assert recorded["passed"] is False and recorded["stages"][0]["passed"] is False
    assert cli.run(["report", str(bundle.path)]) == 0
    page = (bundle.path / "report" / "index.html").read_text()
    assert "NOTHING TO LOSE" in page and 'class="verdict fail"' in page and 'class="word within"' not in page


def test_the_verdict_is_stale_once_an_artifact_is_made_again(good, tiny_graph):
    verify(good, threads=1)
    assert good.has("results/verify.json")
    with good.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)))
    assert not good.has("results/verify.json")


def test_only_what_is_asked_for_runs_and_a_partial_verdict_is_not_recorded(good):
    result = verify(good, artifacts=["int8"], backends=["onnxruntime"], threads=1)
    assert [(s.name, s.backend) for s in result.artifacts] == [("torch", "pytorch"), ("int8", "onnxruntime")]
    assert not (good.path / "results").exists()


def test_artifacts_not_yet_exported_are_left_out_unless_named(make_bundle, colors):
    bundle = with_reference(make_bundle(onnx=GOOD), colors)
    assert [s.name for s in verify(bundle, threads=1).artifacts] == ["torch", "onnx"]
    with pytest.raises(BundleError, match=r"model.int8.onnx has not been made yet; run: edgedetr export .* --int8"):
        verify(bundle, artifacts=["int8"])


class LossyOpenVino(OpenVinoRunner):
    """Forgets the first query, as a miscompiled kernel might."""

    def run(self, images: np.ndarray) -> RawOutputs:
        raw = super().run(images)
        raw.logits[:, 0] = -9
        return raw


def test_a_backend_that_differs_from_the_reference_run_is_named_with_how_much(good, monkeypatch):
    monkeypatch.setattr(openvino, "BACKEND", replace(openvino.BACKEND, open=LossyOpenVino))
    result = verify(good, threads=1)
    by_backend = {(s.name, s.backend): s for s in result.artifacts}
    broken = by_backend["int8", "openvino"]
    assert not broken.passed
    assert not result.passed
    assert broken.reference_run_drop > 50
    assert broken.reference_run.matched < 0.5
    assert "openvino does not compute what model.int8.onnx contains" in broken.note
    assert "on 24 images" in broken.note
    assert all(s.passed == (s.backend != "openvino") == (s.note == "") for s in result.artifacts)


def test_the_node_of_the_first_divergence_is_in_the_note(good, monkeypatch):
    monkeypatch.setattr(openvino, "BACKEND", replace(openvino.BACKEND, open=LossyOpenVino))
    monkeypatch.setattr(judge, "find_first_divergence", lambda *a, **k: "Conv 'fpn': 1.0 dB")
    # Where a node loses much by itself, that one; where rounding adds up, the first that is below the floor.
    for sharp, named in ((None, "Conv 'fpn': 1.0 dB"), ("Add 'sum': 2.0 dB", "Add 'sum': 2.0 dB")):
        monkeypatch.setattr(judge, "find_sharp_divergence", lambda *a, found=sharp, **k: found)
        assert verify(good, threads=1).artifacts[3].note.endswith(f"first divergence at {named}")


def test_layers_that_run_in_floats_are_a_finding_and_no_failure(good, monkeypatch):
    seen = []

    def realized(path, backend, threads):
        seen.append((path.name, backend))
        in_floats = {"/fc": "Gemm"} if backend == "onnxruntime" else {}
        return RealizedPrecision(4, 4 - len(in_floats), in_floats) if "int8" in path.name else None

    monkeypatch.setattr(judge, "realized_precision", realized)
    result = verify(good, threads=1)
    # The simulation of FP16 in ONNX Runtime runs nothing in integers, so it is not asked.
    assert seen == [
        ("model.onnx", "onnxruntime"),
        ("model.int8.onnx", "openvino"),
        ("model.int8-cpu.onnx", "onnxruntime"),
        ("model.int8-cpu.onnx", "openvino"),
    ]
    assert result.passed
    finding = "1 of 4 quantized layers run in floats: /fc as Gemm"
    assert [s.note for s in result.artifacts] == ["", "", "", "", finding, ""]
    assert integer_lines(result) == [
        "int8 (openvino): 4 of 4 quantized layers in integers",
        "int8-cpu (onnxruntime): 3 of 4 quantized layers in integers",
        "int8-cpu (openvino): 4 of 4 quantized layers in integers",
    ]


def test_localize_says_what_was_looked_at_beside_the_verdict(good, capsys):
    # The record of a cure, as export leaves it in the metadata of the graph.
    path = good.require("model.int8.onnx")
    model = onnx.load(path)
    about = {**recorded([Cure("openvino", "openvino-concat", "another order", "layer")]), "weight_bits": 8}
    onnx.helper.set_model_props(model, {MADE_BY: json.dumps(about)})
    with good.add(path.name, stage="quantize") as temporary:
        onnx.save(model, temporary)
    assert cli.run(["verify", str(good.path), "--localize", "--json", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["passed"] and found["localized"]["findings"] == []
    checked = found["localized"]["checked"]
    cure = "openvino-concat, a known fault of openvino, is cured by another order at layer"
    notes = {(stage["name"], stage["backend"]): stage["note"] for stage in found["stages"]}
    assert notes["int8", "openvino"] == notes["int8", "onnxruntime"] == cure and notes["int8-cpu", "openvino"] == ""
    sound = [f"{name}: 0 tensors damaged by their own Q/DQ pair" for name in ("int8", "int8-cpu")]
    assert checked[:3] == [sound[0], f"int8: {cure}", sound[1]]
    assert {"onnx on onnxruntime: as the reference run", "int8-cpu on onnxruntime: as the reference run"} < set(checked)
    # INT8 with FP16 is scored in ONNX Runtime by the reference run itself, so there is nothing to compare.
    assert not any(line.startswith("int8 on onnxruntime") for line in checked)
    assert "int8 on openvino: as the reference run" in shown.err


class NanRunner(OpenVinoRunner):
    def run(self, images: np.ndarray) -> RawOutputs:
        raw = super().run(images)
        return RawOutputs(raw.logits * np.nan, raw.boxes)


@pytest.mark.parametrize("runner, words", [(NanRunner, "NaN"), (None, "cannot compile")])
def test_a_backend_that_gives_nothing_fails_alone_and_says_why(good, monkeypatch, runner, words):
    def refuse(*arguments, **options):
        raise BundleError("OpenVINO cannot compile it")

    monkeypatch.setattr(openvino, "BACKEND", replace(openvino.BACKEND, open=runner or refuse))
    result = verify(good, threads=1)
    broken = result.artifacts[3]
    assert (broken.passed, broken.ap, broken.p50_ms) == (False, 0.0, None)
    assert words in broken.note
    assert all(s.passed == (s.backend != "openvino") for s in result.artifacts)
    assert "edgedetr verify" not in broken.note  # that is what runs here
    json.dumps(result.to_json(), allow_nan=False)


def test_a_graph_that_is_nan_itself_fails_with_advice_that_helps(good, tiny_graph):
    with good.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.full((3, 6), np.nan), np.full((3, 2), -3.0))
    result = verify(good, threads=1)
    for artifact in result.artifacts:
        assert artifact.passed == (artifact.name != "int8")
        if artifact.name == "int8":
            assert "gives NaN or infinity" in artifact.note and "run: edgedetr export" in artifact.note


def test_a_missing_backend_is_left_out_unless_named(good, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "openvino" else object())
    assert "openvino" not in {s.backend for s in verify(good, threads=1).artifacts}
    with pytest.raises(MissingDependency, match="run: pip install openvino"):
        verify(good, backends=["openvino"])


def test_other_bytes_are_refused_even_where_the_image_looks_the_same(good, colors):
    victim = colors / "images" / "test" / "04.png"
    Image.open(victim).save(victim, compress_level=0)
    with pytest.raises(BundleError, match=r"04.png is not the image that reference.npz was made from \(1 of 24"):
        verify(good)


def test_a_copy_of_the_set_elsewhere_is_fine_and_a_smaller_one_is_not(good, colors, tmp_path):
    copy = shutil.copytree(colors, tmp_path / "copy")
    assert verify(good, data=copy, threads=1, artifacts=["onnx"]).passed
    record = json.loads((copy / "annotations" / "test.json").read_text())
    record["images"] = record["images"][1:]
    record["annotations"] = record["annotations"][1:]
    (copy / "annotations" / "test.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="24 images, the data set 23"):
        verify(good, data=copy)


def test_changed_annotations_are_refused(good, colors):
    path = colors / "annotations" / "test.json"
    record = json.loads(path.read_text())
    record["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(BundleError, match="annotations have changed"):
        verify(good)


def test_the_same_classes_under_other_ids_and_in_another_order_are_matched_by_name(good, colors, tmp_path):
    before = evaluate_artifact(good, artifact="onnx")
    other = shutil.copytree(colors, tmp_path / "other")
    path = other / "annotations" / "test.json"
    record = json.loads(path.read_text())
    for row in record["annotations"]:
        row["category_id"] = {1: 90, 2: 7}[row["category_id"]]  # red 1 -> 90, blue 2 -> 7: blue comes first
    record["categories"] = [{"id": 90, "name": "red"}, {"id": 7, "name": "blue"}]
    path.write_text(json.dumps(record))
    assert evaluate_artifact(good, artifact="onnx", data=other).to_json() == before.to_json()
    assert before.per_class == {"red": pytest.approx(100), "blue": pytest.approx(100)}
    assert verify(good, data=other, artifacts=["onnx"], backends=["onnxruntime"]).passed


def test_other_classes_are_refused(good, colors):
    path = colors / "annotations" / "test.json"
    path.write_text(path.read_text().replace('"red"', '"green"'))
    with pytest.raises(DataError, match="objects of the class 'green', which in the model is not among red, blue"):
        verify(good)


def test_live_makes_the_reference_anew(bad):
    seen = []

    def live(bundle, dataset):
        seen.append(len(dataset))
        return Reference.load(bundle.require("reference.npz"))

    verify(bad, live=live, threads=1, artifacts=["onnx"])
    assert seen == [24]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"artifacts": ["int4"]}, UsageError, "did you mean 'int8'"),
        ({"backends": ["tensorflow"]}, UsageError, "'tensorflow'; expected one of onnxruntime, openvino"),
        ({"max_drop": math.nan}, RecipeError, "verify.budget is nan"),
        ({"max_drop": -1}, RecipeError, "verify.budget is -1"),
        ({"artifacts": ["fp16"], "backends": ["openvino"]}, BundleError, "nothing to run"),
        ({"data": "/nowhere"}, DataError, "nowhere"),
    ],
)
def test_wrong_words_and_numbers(good, arguments, error, message):
    with pytest.raises(error, match=message):
        verify(good, **arguments)


def test_a_bundle_without_a_reference_names_the_command(make_bundle):
    with pytest.raises(BundleError, match=r"reference.npz has not been made yet; run: edgedetr export"):
        verify(make_bundle(onnx=GOOD))


@pytest.mark.parametrize("field, value", [("budget", 101), ("bootstrap", 10), ("threads", 0), ("parity_images", -1)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(RecipeError, match=f"verify.{field} is {value}; expected"):
        VerifyConfig(**{field: value})


def test_read_only_storage_loses_the_record_and_not_the_verdict(good, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Bundle, "add", refuse)
    assert verify(good, threads=1).passed


def test_results_behind_a_link_are_refused_before_anything_is_measured(good, tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (good.path / "results").symlink_to(tmp_path / "outside")
    monkeypatch.setattr("edgedetr.evaluation.verify.run_artifacts", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(BundleError, match="results: a link"):
        verify(good)
    assert list((tmp_path / "outside").iterdir()) == []


def test_one_artifact_alone_is_measured_like_in_the_verdict(bad):
    result = verify(bad, threads=1)
    for artifact in result.artifacts:
        backend = None if artifact.name == "torch" else artifact.backend
        assert evaluate_artifact(bad, artifact=artifact.name, backend=backend).ap == pytest.approx(artifact.ap)
    with pytest.raises(DataError, match="no split 'val'"):
        evaluate_artifact(bad, artifact="torch", split="val")
