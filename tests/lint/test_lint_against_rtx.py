"""Lint reports an error where NVIDIA's parser or builder refuses a graph, and none where it builds it.

rtx_answers.json holds what TensorRT-RTX 1.7.1.116 answered to each of the graphs of rtx_cases: true where it built
an engine. Asking takes a minute or two, so the slow test asks again and compares; after a change of the graphs, write
the record anew with:  EDGEDETR_WRITE_RTX_ANSWERS=1 pytest -m slow tests/lint/test_lint_against_rtx.py
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("onnx", minversion="1.21")  # the graphs are written in the newest operators

import rtx_cases_quantized  # noqa: F401  (adds its own to the cases)
from rtx_cases import CASES

from edgedetr.lint.lint import lint
from edgedetr.lint.rtx import check_all

RECORD = Path(__file__).with_name("rtx_answers.json")
HAS_RTX = any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings")))

MYELIN = (
    "the CPU build of RTX 1.7.1 has no float32 form of it (Myelin: is_decomposable); float16 builds, and so does "
    "float32 with the heads folded in. NVIDIA documents float32 for TensorRT"
)
UNSIGNED = (
    "RTX builds uint8 with zero point 0 as int8, so that values above 127 steps are cut off: no refusal, "
    "but another answer than ONNX's"
)
NO_ONNX = "its sizes contradict ONNX's definition of the operator, and onnx's own inference refuses it; RTX goes on"
# Graph -> why lint and RTX differ about it.
EXCEPTIONS = {
    **{f"attention/{name}": MYELIN for name in ("plain", "mask", "mask-2d", "bool-mask", "causal", "larger")},
    "recurrent/lstm-layout": "the parser does not look at layout and gives what 0 gives (documented: must be 0)",
    "whole/missing-input": "Add of one input is no ONNX, and no other reader takes it",
    **{f"fit/{name}": NO_ONNX for name in ("tile-axis", "split-sum", "conv-rank-mismatch", "resize-both")},
    "fit/lstm-bad": "the sizes of recurrent weights are not compared",
    "whole/NaN-constant": "it builds, and answers NaN",
    "quantized/zero-point-uint8-0": UNSIGNED,
    "quantized/no-zero-point": UNSIGNED,
    "quantized/activation-per-channel": "NVIDIA documents one scale for activations (NvInfer.h, IQuantizeLayer)",
    "quantized/conv-weight-input": "NVIDIA documents scales per channel for constants alone (NvInfer.h)",
}
# The same for TensorRT 11 compared with RTX, which has fewer kernels for a CPU.
OTHERS = {"kinds/ConvTranspose-bfloat16": "NVIDIA documents bfloat16 for it"}


@cache
def record() -> dict[str, bool]:
    answers: dict[str, bool] = json.loads(RECORD.read_text(encoding="utf-8"))
    return answers


def differing(target: str) -> dict[str, str]:
    """Graphs on which lint and the record differ, with lint's findings."""
    found = {}
    for name, model in CASES.items():
        errors = [finding for finding in lint(model, [target]) if finding.worst == "error"]
        if record()[name] == bool(errors):
            found[name] = "; ".join(map(str, errors)) or "no error"
    return found


def test_the_record_has_every_graph_and_enough_good_and_bad_ones():
    assert record().keys() == CASES.keys()
    assert sum(record().values()) >= 500
    assert sum(not built for built in record().values()) >= 150


def test_lint_agrees_with_rtx_on_every_graph_but_those_listed():
    found = differing("rtx-1.7")
    assert {name: said for name, said in found.items() if name not in EXCEPTIONS} == {}
    assert found.keys() == EXCEPTIONS.keys()  # a reason that is no longer needed goes


def test_lint_for_tensorrt_11_differs_only_where_rtx_is_documented_to():
    found = differing("trt-11")
    assert {name: said for name, said in found.items() if name not in {**EXCEPTIONS, **OTHERS}} == {}
    assert found.keys() == {**EXCEPTIONS, **OTHERS}.keys()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RTX, reason="needs TensorRT-RTX: pip install tensorrt-rtx (x86-64)")
def test_rtx_still_answers_as_recorded(tmp_path):
    paths = []
    for number, model in enumerate(CASES.values()):
        paths.append(tmp_path / f"{number}.onnx")
        paths[-1].write_bytes(model.SerializeToString())
    results = check_all(paths)
    assert {result.version for result in results} <= {"1.7.1.116", ""}
    answers = {name: result.ok and bool(result.built) for name, result in zip(CASES, results)}
    if os.environ.get("EDGEDETR_WRITE_RTX_ANSWERS"):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(built)}" for name, built in answers.items())
        RECORD.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    differ = {name: str(result) for name, result in zip(CASES, results) if answers[name] != record().get(name)}
    assert differ == {}
