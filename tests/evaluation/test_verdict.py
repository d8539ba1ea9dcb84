"""The typed verdict and its JSON form: files of earlier versions load, and what is written is read back equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgedetr.evaluation.agreement import Agreement
from edgedetr.evaluation.realized_precision import RealizedPrecision
from edgedetr.evaluation.verdict import ArtifactVerdict, DeviceVerdict, EngineVerdict, Verdict, read_verdict

STORED = Path(__file__).parents[1] / "fixtures" / "bundle-0.1" / "results" / "verify.json"
LEAST = {"name": "onnx", "backend": "onnxruntime", "passed": True, "ap": 50, "ap50": 70, "drop": 0, "drop_upper95": 0.5}

REALIZED = {"quantized": 1, "in_integers": 1, "in_floats": {}, "unknown": []}


def test_a_verdict_of_version_0_1_is_read_and_written_again_byte_for_byte():
    verdict = read_verdict(STORED, STORED.parent)
    assert json.dumps(verdict.to_json(), indent=1) + "\n" == STORED.read_text()
    assert [artifact.label for artifact in verdict.artifacts] == [
        "torch (pytorch)",
        "onnx (onnxruntime)",
        "fp16 (onnxruntime)",
        "int8 (onnxruntime)",
        "int8 (openvino)",
        "int8-cpu (onnxruntime)",
    ]
    assert (verdict.tolerance, verdict.certifiable) == (100.0, 0.3578718485045082)
    openvino = verdict.artifacts[4]
    assert openvino.reference_run_drop == 0.19751082251082244 and openvino.agreement == Agreement(0, *[None] * 6)
    assert [artifact.is_reference for artifact in verdict.artifacts] == [True] + [False] * 5


def test_engines_and_the_device_are_read_back_equal():
    agreement = Agreement(10, 0.9, 0.1, 0.01, 0.02, 0.5, 1.5)
    engine = EngineVerdict(
        "int8 batch 4",
        "tensorrt",
        True,
        50.0,
        70.0,
        0.1,
        0.6,
        p50_ms=2.0,
        p99_ms=2.5,
        per_class={"red": 50.0, "blue": None},
        images=24,
        agreement=agreement,
        engine="int8-4.plan",
        batch=4,
        precision_fraction=0.8,
        reformats=2,
        rows_matched=1.0,
        integers=RealizedPrecision(5, 3, {"/fc": "Gemm (fused)"}, ("/conv",)),
    )
    torch = ArtifactVerdict("torch", "pytorch", True, 50.1, 70.0, 0.0, 0.0, size_mb=1.5)
    verdict = DeviceVerdict(True, 1.0, 0.6, (torch, engine), "Orin (sm_87)", "10.3.0", "mode 15W", "int8-4.plan")
    raw = json.loads(json.dumps(verdict.to_json()))
    assert Verdict.from_json(raw) == verdict
    assert verdict.engines == (engine,)
    # a key that 0.2 did not know is left out where there is nothing to say
    assert "integers" not in raw["stages"][0]
    assert raw["stages"][1]["integers"] == {
        "quantized": 5,
        "in_integers": 3,
        "in_floats": {"/fc": "Gemm (fused)"},
        "unknown": ["/conv"],
    }
    # the keys of earlier versions
    assert (raw["budget"], raw["conditions"]) == (1.0, "mode 15W")
    stored = raw["stages"][1]
    assert (stored["share"], stored["rows"], stored["parity"]["matched"], stored["oracle"]) == (0.8, 1.0, 0.9, None)


def test_keys_that_may_be_missing_have_their_defaults():
    verdict = Verdict.from_json({"passed": True, "budget": 1, "stages": [LEAST]})
    assert verdict.artifacts == (ArtifactVerdict("onnx", "onnxruntime", True, 50.0, 70.0, 0.0, 0.5),)
    assert verdict.certifiable == 0.5  # the largest bound


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ap": None}, r"stages\[0\].ap is not a finite number"),
        ({"drop": True}, r"stages\[0\].drop is not a finite number"),
        ({"drop_upper95": float("nan")}, "drop_upper95 is not a finite number"),
        ({"p50_ms": "2"}, "p50_ms is not a finite number"),
        ({"name": 3}, "name is not a text"),
        ({"note": "x" * 10_001}, "note is not a text of at most 10000 characters"),
        ({"passed": 1}, "passed is not true or false"),
        ({"images": -1}, "images is not a whole number"),
        ({"per_class": [1]}, "per_class is not an object"),
        ({"per_class": {"red": "50"}}, "per_class is not a finite number"),
        ({"parity": 3}, r"stages\[0\].parity is not an object"),
        ({"oracle": {"matched": "all"}}, r"oracle.matched is not a finite number"),
        ({"engine": 7}, "engine is not a text"),
        ({"integers": 3}, r"stages\[0\].integers is not an object"),
        ({"integers": {**REALIZED, "in_floats": ["/fc"]}}, "in_floats is not an object"),
        ({"integers": {**REALIZED, "in_floats": {"/fc": 2}}}, "in_floats is not an object of texts"),
        ({"integers": {**REALIZED, "quantized": -1}}, "quantized is not a whole number"),
    ],
)
def test_what_is_missing_or_of_another_type_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        Verdict.from_json({"passed": True, "budget": 1, "stages": [{**LEAST, **change}]})
