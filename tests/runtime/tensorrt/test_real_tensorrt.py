"""What can be run of NVIDIA's own libraries without a GPU: the builder of TensorRT-RTX, and a runtime without a driver.

TensorRT-RTX has the interface of TensorRT 11 and builds on a CPU; its engines are for other devices and are not loaded.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgedetr
from edgedetr.bundle import Bundle
from edgedetr.errors import DeviceError, EngineError
from edgedetr.runtime.tensorrt import build, gpu
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.gpu import Device

NOWHERE = Device("no device", 89, 8 << 30, False, "13.0", "13.0")
LEAN = {"bindings": "tensorrt-lean-cu13-bindings==11.4.0.106", "libs": "tensorrt-lean-cu13-libs==11.4.0.106"}


def arguments(precision: str = "int8", batch: tuple[int, int, int] = (1, 1, 1)) -> BuildArguments:
    return BuildArguments(precision, batch, 256, 3, "auto")


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT-RTX instead of TensorRT."""
    module = pytest.importorskip("tensorrt_rtx_bindings", reason="needs edgedetr[trt-check]: NVIDIA's builder on a CPU")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def graph(make_bundle: Callable[..., Bundle]) -> bytes:
    return (make_bundle("model.onnx", batch="B").path / "model.onnx").read_bytes()


def attempt(
    rtx: ModuleType,
    model: bytes,
    batch: tuple[int, int, int] = (1, 1, 1),
    *,
    precision: str = "fp32",
    timing_cache: bytes = b"",
    progress: build.Progress | None = None,
) -> build._Built:
    return build._attempt(rtx, model, arguments(precision, batch), "strong", timing_cache, progress)


def test_the_builder_builds_a_static_and_a_dynamic_engine_and_reports_progress(rtx, graph):
    heard: list[tuple[str, int, int]] = []
    static = attempt(rtx, graph, (4, 4, 4), progress=lambda *words: heard.append(words))
    dynamic = attempt(rtx, graph, (1, 2, 4), timing_cache=static.timing_cache)
    assert len(static.data) > 1000 and len(dynamic.data) > 1000 and static.timing_cache
    assert heard[0][1] == 0 and heard[-1][1] == heard[-1][2] and {what for what, _, _ in heard} == {heard[0][0]}


def test_timings_of_another_kind_do_not_stop_the_real_builder(rtx, graph):
    assert attempt(rtx, graph, timing_cache=b"of another world").timing_cache


def test_an_impossible_range_of_batch_sizes_is_one_error(rtx, graph):
    with pytest.raises(EngineError, match="rejects batch sizes 4, 2, 1"):
        attempt(rtx, graph, (4, 2, 1))


def test_ctrl_c_passes_through_the_real_builder(rtx, graph):
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(rtx, graph, progress=interrupt)


def test_the_real_parser_names_the_node_it_refuses(rtx):
    scale, zero = (numpy_helper.from_array(np.array(v), n) for v, n in ((np.float32(0.1), "s"), (np.int8(3), "z")))
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="/stem/Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["logits"], name="/stem/DQ"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, [1, 3])],
        [value("logits", TensorProto.FLOAT, [1, 3])],
        [scale, zero],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    with pytest.raises(EngineError, match=r"node /stem/D?Q .*ero point"):
        build.build_serialized(model, arguments(), NOWHERE)


@pytest.mark.parametrize("keep", [0.3, 0.97])
def test_a_graph_that_is_cut_off_is_refused_by_the_real_parser(rtx, graph, keep):
    with pytest.raises(EngineError, match="parser rejects the graph"):
        build.build_serialized(graph[: int(keep * len(graph))], arguments("fp32"), NOWHERE)


def test_the_real_runtime_without_a_driver_is_one_error(rtx, graph):
    if has_gpu():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(EngineError, match="built an engine that it cannot load"):
        build.build_serialized(graph, arguments("fp32", (1, 1, 4)), NOWHERE)


def has_gpu() -> bool:
    try:
        gpu.probe()
    except DeviceError:
        return False
    return True


LOAD = """
    import ctypes, sys
    sys.path[:0] = sys.argv[1:4]
    import tensorrt_lean_bindings as lean
    sys.modules["tensorrt"] = lean
"""
UNCHECKED = (
    LOAD
    + """
    runtime = lean.Runtime(lean.Logger())
    print("a Runtime is there:", runtime is not None, flush=True)
    runtime.deserialize_cuda_engine(b"a plan")
"""
)
CHECKED = (
    LOAD
    + """
    from edgedetr.errors import EdgedetrError
    from edgedetr.runtime.tensorrt import gpu, trt_runner as trt
    print(gpu.why_unavailable())
    for run in (lambda: trt.TrtRunner(sys.argv[4]), lambda: trt.Session(b"a plan")):
        try:
            run()
        except EdgedetrError as error:
            print(type(error).__name__, error)
"""
)


def test_without_a_driver_the_check_reports_before_the_runtime_crashes(bindings, tmp_path):
    """Run for real: the lean runtime gives an object that ends the process when it is used; ours raises one error."""
    if has_gpu():
        pytest.skip("needs a machine without a GPU")
    try:
        folders = bindings.fetch(LEAN, tmp_path)
    except bindings.Unavailable as reason:
        pytest.skip(f"needs NVIDIA's lean runtime: {reason}")
    plan = tmp_path / "e.plan"
    plan.write_bytes(b"a plan")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        root = Path(edgedetr.__file__).parents[1]
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, folders.values()), str(root), str(plan)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    checked = run(CHECKED)
    assert checked.returncode == 0, checked.stderr
    lines = checked.stdout.splitlines()
    assert len(lines) == 3 and all("no NVIDIA driver" in line for line in lines)
    assert [line.split()[0] for line in lines[1:]] == ["DeviceError"] * 2
    crashed = run(UNCHECKED)
    assert "a Runtime is there: True" in crashed.stdout and crashed.returncode < 0  # by a signal: SIGSEGV here
