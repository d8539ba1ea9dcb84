"""The messages of NVIDIA's own parser and builder about a file, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.errors import BundleError
from edgedetr.lint import rtx
from edgedetr.lint.rtx import check, check_all

needs_rtx = pytest.mark.skipif(
    not any(map(find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))),
    reason="needs NVIDIA's parser on a CPU: make test installs it on x86-64",
)


def model(nodes: list[onnx.NodeProto], fp16: bool = False, **constants: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.fixture
def saved(tmp_path) -> Callable[[ModelProto], Path]:
    def save(made: ModelProto) -> Path:
        path = tmp_path / "case.onnx"
        path.write_bytes(made.SerializeToString())
        return path

    return save


@needs_rtx
def test_unequal_types_at_an_addition_are_named_with_the_node(saved):
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], "to_half", to=TensorProto.FLOAT16),
        helper.make_node("Add", ["half", "images"], ["logits"], "the_sum"),
    ]
    result = check(saved(model(nodes)))
    assert not result.ok and not result.parsed and result.built is None
    assert any("the_sum" in error and "Half" in error and "Float" in error for error in result.errors), result.errors
    assert "does not parse" in str(result) and rtx.LIMIT in str(result)
    assert result.to_json()["ok"] is False and result.to_json()["limit"] == rtx.LIMIT


@needs_rtx
def test_what_parses_and_does_not_build_says_why(saved):
    nodes = [
        helper.make_node("Reshape", ["images", "flat"], ["row"], "flatten"),
        helper.make_node("TopK", ["row", "many"], ["logits", "places"], "best"),
    ]
    wide = model(nodes, flat=np.array([1, -1]), many=np.array([3841]))
    wide.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 512
    wide.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 8
    path = saved(wide)
    assert check(path, build=False).ok
    result = check(path)
    assert result.parsed and result.built is False and not result.ok
    assert any("3840" in error for error in result.errors), result.errors
    assert "parses, but does not build" in str(result)


@needs_rtx
def test_an_open_batch_size_builds(saved):
    nodes = [helper.make_node("Conv", ["images", "w"], ["logits"], "conv")]
    made = model(nodes, w=np.ones((8, 4, 1, 1), np.float32))
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert check(saved(made)).built


@needs_rtx
def test_what_is_no_onnx_is_one_error_and_a_crash_does_not_hide_the_other_files(tmp_path, saved, monkeypatch):
    good = saved(model([helper.make_node("Relu", ["images"], ["logits"], "relu")]))
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no protobuf at all")
    result = check(bad)
    assert not result.parsed and result.errors
    crash = tmp_path / "crash.py"
    crash.write_text(
        "import json, os, sys, runpy\n"
        f"module = runpy.run_path({str(rtx.WORKER)!r})\n"
        "request = json.loads(sys.argv[1])\n"
        "trt = module['bindings']()\n"
        "for path in request['files']:\n"
        "    if 'bad' in path: os.abort()\n"
        "    print(json.dumps(module['examine'](trt, path, False)), flush=True)\n"
    )
    monkeypatch.setattr(rtx, "WORKER", crash)
    bad.write_bytes(Path(good).read_bytes())
    first, second, third = check_all([good, bad, good])
    assert first.ok and third.ok and not second.ok
    assert second.path == str(bad) and "signal 6" in second.errors[0]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BundleError, match="gone.onnx: no such file.*run: edgedetr export"):
        check(tmp_path / "gone.onnx")
