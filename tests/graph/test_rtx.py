"""Every member of the family in NVIDIA's own parser and builder, in float32, FP16 and INT8."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import members
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.errors import BundleError
from edgedetr.graph import rtx
from edgedetr.graph.rtx import RtxResult, check, check_all
from edgedetr.models import FAMILY
from edgedetr.quantization.dialect import TENSORRT, tensors, tied
from edgedetr.quantization.half import float_tensors, halve
from edgedetr.quantization.policy import load, plan
from edgedetr.quantization.qdq import insert
from edgedetr.quantization.rewrite import split_concats

CASES = [*((name, "gather") for name in FAMILY), ("rt_detr", "grid_sample")]
PRECISIONS = ("fp32", "fp16", "int8")
OLD = ("tensorrt-rtx-cu13-bindings==1.4.0.76", "tensorrt-rtx-cu13-libs==1.4.0.76")     # of the age of TensorRT 10.16

needs_rtx = pytest.mark.skipif(not any(map(find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))),
                               reason="needs NVIDIA's parser on a CPU: pip install 'edgedetr[trt-check]' (x86-64)")


def magnitudes(model: ModelProto) -> dict[str, float]:
    """The largest magnitude of every float tensor on one noise picture, node by node: optimising takes seconds."""
    probe, names = ModelProto(), sorted(float_tensors(model) - {"images"})
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, members.HEIGHT, members.WIDTH)).astype(np.float32)
    found = zip(names, session.run(names, {"images": noise}))
    return {"images": 255.0, **{name: float(np.abs(value).max(initial=0)) for name, value in found}}


def graphs(name: str, sampling: str, folder: Path) -> dict[str, Path]:
    """A member at micro size as the three files that engines are built from."""
    paths = {precision: folder / f"{name}-{sampling}-{precision}.onnx" for precision in PRECISIONS}
    shutil.copy(members.exported(name, sampling=sampling), paths["fp32"])
    model, policy = onnx.load(str(paths["fp32"])), load("default")
    paths["fp16"].write_bytes(halve(model, magnitudes(model), policy.float32).SerializeToString())
    model = split_concats(model)
    seen, chosen = magnitudes(model), plan(model, policy)
    quantised = insert(model, chosen, tied(model, {name: seen[name] for name in tensors(model, chosen)}), TENSORRT)
    paths["int8"].write_bytes(halve(quantised, seen, policy.float32).SerializeToString())
    return paths


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Path]]:
    """(member, sampling) -> its three files, made once."""
    folder = tmp_path_factory.mktemp("graphs")
    return cache(lambda name, sampling: graphs(name, sampling, folder))


@pytest.fixture(scope="module")
def results(three: Callable[[str, str], dict[str, Path]]) -> dict[tuple[str, str, str], RtxResult]:
    """One process per member, so that the library starts ten times and not thirty; it builds while the next is made."""
    with ThreadPoolExecutor(2) as pool:
        running = {case: pool.submit(check_all, list(three(*case).values())) for case in CASES}
    return {(*case, precision): one for case, found in running.items() for precision, one in
            zip(PRECISIONS, found.result())}


@needs_rtx
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name, sampling", CASES, ids="-".join)
def test_every_member_parses_and_builds_without_a_gpu(name, sampling, precision, results):
    result = results[name, sampling, precision]
    assert result.version.startswith("1.7."), result.version
    assert result.ok and result.built, str(result)
    assert result.errors == ()
    assert result.layers > 100 and result.plan_bytes > 100_000


@pytest.fixture(scope="module")
def old_parser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtx-1.4.0")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*install, *OLD], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"TensorRT-RTX 1.4.0 cannot be installed here: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_every_member_parses_in_the_parser_of_the_10x_age(three, old_parser):
    found = check_all([path for case in CASES for path in three(*case).values()], build=False, packages=old_parser)
    assert {result.version for result in found} == {"1.4.0.76"}
    assert [str(result) for result in found if not result.parsed or result.errors] == []


def model(nodes: list[onnx.NodeProto], half: bool = False, **constants: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16 if half else TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
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
    nodes = [helper.make_node("Cast", ["images"], ["half"], "to_half", to=TensorProto.FLOAT16),
             helper.make_node("Add", ["half", "images"], ["logits"], "the_sum")]
    result = check(saved(model(nodes)))
    assert not result.ok and not result.parsed and result.built is None
    assert any("the_sum" in error and "Half" in error and "Float" in error for error in result.errors), result.errors
    assert "does not parse" in str(result) and rtx.LIMIT in str(result)
    assert result.to_json()["ok"] is False and result.to_json()["limit"] == rtx.LIMIT


@needs_rtx
def test_what_parses_and_does_not_build_says_why(saved):
    nodes = [helper.make_node("Reshape", ["images", "flat"], ["row"], "flatten"),
             helper.make_node("TopK", ["row", "many"], ["logits", "places"], "best")]
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
    crash.write_text("import json, os, sys, runpy\n"
                     f"module = runpy.run_path({str(rtx.PROCESS)!r})\n"
                     "order = json.loads(sys.argv[1])\n"
                     "trt = module['bindings']()\n"
                     "for path in order['files']:\n"
                     "    if 'bad' in path: os.abort()\n"
                     "    print(json.dumps(module['examine'](trt, path, False)), flush=True)\n")
    monkeypatch.setattr(rtx, "PROCESS", crash)
    first, second, third = check_all([good, bad, good])
    assert first.ok and third.ok and not second.ok
    assert second.path == str(bad) and "signal 6" in second.errors[0]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BundleError, match="gone.onnx: no such file.*run: edgedetr export"):
        check(tmp_path / "gone.onnx")
