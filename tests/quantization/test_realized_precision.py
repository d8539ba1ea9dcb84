"""Which quantized layers run in integers: every member on the backends of this machine, and graphs worked by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from members import exported
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.artifacts import OPENVINO, ORT
from edgedetr.evaluation.realized_precision import (
    QuantizedLayer,
    RealizedPrecision,
    compare,
    quantized_layers,
    realized_by_engine,
    realized_precision,
)
from edgedetr.models import FAMILY
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.quantization.qdq import bias_input, insert_qdq, runnable
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.target import CPU, TENSORRT, Target
from edgedetr.runtime.backends import base
from edgedetr.runtime.kernels import Kernel
from edgedetr.runtime.onnx_bytes import nodes

CASES = [
    *((name, CPU, backend) for name in FAMILY for backend in (ORT, OPENVINO)),
    *((name, TENSORRT, OPENVINO) for name in ("detr", "rt_detr", "d_fine")),
]

# {backend: {end of a quantized layer's name: why it runs in floats there}}. A layer that is not listed must run in
# integers, in every member.
IN_FLOATS: dict[str, dict[str, str]] = {ORT: {}, OPENVINO: {}}


@cache
def quantized(name: str, target: Target) -> tuple[bytes, int]:
    """A member's graph by the default policy, and the number of its INT8 layers.

    Biases are corrected as export does it, by 0; every range is 1: neither changes what a kernel is chosen for.
    """
    model = split_concats(onnx.load(exported(name, 1)))
    graph = GraphIndex(model)
    plan = make_plan(graph, load_policy("default"))
    amax = dict.fromkeys(tensors_to_observe(graph, plan), 1.0)
    corrected = [layer for layer in plan.layers if bias_input(layer, graph) is not None]
    shifts = {
        layer.node: np.zeros(graph.initializers[layer.weight].dims[layer.axis], np.float32) for layer in corrected
    }
    return runnable(insert_qdq(graph, plan, amax, target, shifts), target).SerializeToString(), len(plan.layers)


@cache
def realized(name: str, target: Target, backend: str) -> RealizedPrecision:
    found = realized_precision(quantized(name, target)[0], backend, threads=1)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "target", "backend"), CASES, ids=lambda value: getattr(value, "name", value))
def test_quantized_layers_run_in_integers_or_are_listed_with_the_reason(
    name: str, target: Target, backend: str
) -> None:
    if reason := base.get(backend).unavailable():
        pytest.skip(reason)
    found = realized(name, target, backend)
    assert found.quantized == quantized(name, target)[1] > 0  # the policy's own count
    assert found.in_integers + len(found.in_floats) == found.quantized and not found.unknown
    assert [node for node in found.in_floats if not node.endswith(tuple(IN_FLOATS[backend]))] == []


@pytest.mark.parametrize(("backend", "end"), [(backend, end) for backend, ends in IN_FLOATS.items() for end in ends])
def test_every_listed_exception_is_seen_in_some_member(backend: str, end: str) -> None:
    if reason := base.get(backend).unavailable():
        pytest.skip(reason)
    found = [realized(*case).in_floats for case in CASES if case[2] == backend]
    assert any(node.endswith(end) for nodes in found for node in nodes)


# ------------------------------------------------------------------------------------------------------ worked by hand


def graph(*parts: str, **constants: np.ndarray) -> ModelProto:
    """A graph from lines like "Conv a: x w -> y"; `x` is its input and `y` its output."""
    made = []
    for part in parts:
        head, _, rest = part.partition(": ")
        inputs, _, outputs = rest.partition(" -> ")
        operator, name = head.split()
        made.append(helper.make_node(operator, inputs.split(), outputs.split(), name))
    return helper.make_model(
        helper.make_graph(
            made,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )


PAIR = ("QuantizeLinear q: x s z -> xq", "DequantizeLinear dq: xq s z -> xd", "DequantizeLinear wq: w s wz -> wd")
CONSTANTS = {
    "s": np.float32(0.02),
    "z": np.uint8(128),
    "wz": np.int8(0),
    "w": np.arange(-32, 32, dtype=np.int8).reshape(8, 8),
    "v": np.ones((8, 8), np.float32),
    "b": np.arange(8, dtype=np.float32),
    "flat": np.array([4, 8]),
}


def test_a_layer_is_quantized_where_both_factors_are_and_moves_of_elements_do_not_count() -> None:
    model = graph(
        *PAIR,
        "Reshape r: xd flat -> rows",
        "MatMul both: rows wd -> m",
        "MatMul half: xd v -> n",
        "Gemm moved: rows wd b -> o",
        "Add end: m o -> y",
    )
    found = quantized_layers(nodes(model.SerializeToString()))
    assert found == [QuantizedLayer("both", "w", ("m", "end", "y")), QuantizedLayer("moved", "w", ("o", "end", "y"))]


def test_a_layer_finds_its_kernel_by_weight_by_name_or_by_what_follows_it() -> None:
    layers = [QuantizedLayer(f"n{i}", f"w{i}", (f"t{i}", f"add{i}")) for i in range(5)]
    kernels = [
        Kernel("QLinearConv", True, frozenset({"w0"})),
        Kernel("FullyConnected", True, frozenset({"n1"})),
        Kernel("FullyConnected", False, frozenset({"add2"})),
        Kernel("Gemm", False, frozenset({"w3"})),
    ]
    found = compare(layers, kernels, {"Gemm": "fused too early"})
    assert (found.quantized, found.in_integers, found.unknown) == (5, 2, ("n4",))
    assert found.in_floats == {"n2": "FullyConnected", "n3": "Gemm (fused too early)"}
    assert str(found) == "2 of 5 quantized layers in integers, 1 unknown"
    assert found.finding() == (
        "2 of 5 quantized layers run in floats: n2 as FullyConnected; n3 as Gemm (fused too early)"
    )


def test_many_layers_with_one_kernel_are_named_by_three_and_their_number() -> None:
    layers = [QuantizedLayer(f"n{i}", f"w{i}", ()) for i in range(9)]
    found = compare(layers, [Kernel("Gemm", False, frozenset(f"w{i}" for i in range(9)))])
    assert found.finding() == "9 of 9 quantized layers run in floats: n0, n1, n2 and 6 more as Gemm"
    assert compare(layers, []).finding() == ""  # nothing is known, so nothing is claimed


@pytest.mark.parametrize(("bias", "in_integers"), [(np.float32([[range(8)]]), 1), (np.arange(8, dtype=np.float32), 0)])
def test_onnx_runtime_loses_the_integers_of_a_product_with_a_plain_bias(bias: np.ndarray, in_integers: int) -> None:
    """The shape of the bias decides alone: [8] becomes part of a float Gemm, [1, 1, 8] does not."""
    model = graph(*PAIR, "MatMul m: xd wd -> p", "Add a: p b -> y", **{**CONSTANTS, "b": bias})
    found = realized_precision(model.SerializeToString(), ORT)
    assert found is not None and (found.quantized, found.in_integers) == (1, in_integers)
    assert all(kernel.startswith("Gemm (MatMul and the Add") for kernel in found.in_floats.values())


def test_what_cannot_be_told_is_none() -> None:
    plain = graph("MatMul m: x v -> y", v=np.ones((8, 8), np.float32)).SerializeToString()
    assert realized_precision(plain, ORT) is None  # nothing is quantized
    assert realized_precision(quantized("detr", CPU)[0], "tensorrt") is None  # it runs engines, not graphs


def test_the_layers_of_an_engine_are_found_by_the_names_of_their_nodes(tmp_path: Path) -> None:
    model = graph(*PAIR, "MatMul /m: xd wd -> p", "Add /a: p b -> q", "MatMul /n: xd wd -> o", "Add /e: q o -> y")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)

    def layer(name: str, kind: str, **more: object) -> dict[str, object]:
        return {"Name": name, "LayerType": "gemm", "Inputs": [{"Format/Datatype": kind}], "Outputs": [], **more}

    first = layer("/m + /a", "Row major Int8 format")
    for second, in_integers in (
        (layer("__myl_Fc", "Int8", Metadata="[ONNX Layer: /n]\x1f[ONNX Layer: /e]"), 2),
        (layer("/n", "Row major linear FP16 format"), 1),
    ):
        found = realized_by_engine(path, json.dumps({"Layers": [first, second, "a name alone"]}))
        assert found is not None and (found.quantized, found.in_integers) == (2, in_integers)
        assert list(found.in_floats) == ["/n"] * (2 - in_integers)


def test_nodes_are_those_that_the_onnx_package_reads() -> None:
    path = exported("detr", 1)
    theirs = [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in onnx.load(path).graph.node]
    assert [(n.operator, n.name, n.inputs, n.outputs) for n in nodes(path.read_bytes())] == theirs
