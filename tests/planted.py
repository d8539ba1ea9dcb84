"""Small graphs with a fault planted in them, or the same without it: what lint is tested on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
ZERO, STEP = np.int8(0), np.float32(0.1)
RNG = np.random.default_rng(0)


def graph_of(
    nodes: Sequence[NodeProto],
    inputs: dict[str, tuple],
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 19,
    domains: Sequence[str] = (),
) -> ModelProto:
    """inputs {name: (element type, shape)}; the last node's first output is the graph's."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    result = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    graph = helper.make_graph(list(nodes), "g", values, [result], stored)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    try:
        return onnx.shape_inference.infer_shapes(model)  # the outputs get their types, as in an exporter's file
    except onnx.shape_inference.InferenceError:
        return model


def node(kind: str, inputs: str, output: str, **attributes) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], f"the_{kind}", **attributes)


def one(kind: str, *, shape=(1, 4, 8, 8), opset: int = 19, **attributes) -> ModelProto:
    """A graph of one node that reads x."""
    return graph_of([node(kind, "x", "y", **attributes)], {"x": (F32, shape)}, opset=opset)


def quantized_conv(
    *,
    zero=ZERO,
    scale=STEP,
    axis=0,
    channels=32,
    out=32,
    weight_scale=None,
    kind=np.float32,
    data=True,
    weight=True,
    relu_between=False,
    opset: int = 19,
    missing_zero: bool = False,
    groups: int = 1,
) -> ModelProto:
    """x -> Q -> DQ -> Conv <- DQ <- integer weight; each part as asked for."""
    element = F16 if kind is np.float16 else F32
    scale = np.asarray(scale)
    constants = {
        "s": scale,
        "z": np.asarray(zero),
        "w": RNG.integers(-9, 9, (out, channels // groups, 1, 1), dtype=np.int8),
        "ws": np.full((out, channels)[axis], 0.1, kind) if weight_scale is None else weight_scale,
    }
    constants["wz"] = np.zeros(constants["ws"].shape, np.int8)
    constants["f"] = np.ones((out, channels // groups, 1, 1), kind)
    grouped = {"group": groups} if groups > 1 else {}
    third = "" if missing_zero else " z"
    nodes = [
        node("QuantizeLinear", f"x s{third}", "q"),
        node("DequantizeLinear", f"q s{third}", "d"),
        node("DequantizeLinear", "w ws wz", "wd", axis=axis),
        node("Conv", f"{'d' if data else 'x'} {'wd' if weight else 'f'}", "c", **grouped),
    ]
    if relu_between:
        constants.update({"cs": np.asarray(0.2, kind), "cz": np.int8(0)})
        nodes += [node("QuantizeLinear", "c cs cz", "cq"), node("DequantizeLinear", "cq cs cz", "cd")]
    nodes.append(node("Relu", "cd" if relu_between else "c", "y"))
    if not data:
        nodes = nodes[2:]
    if not weight:
        nodes = [item for item in nodes if item.output[0] != "wd"]
    used = {name for item in nodes for name in item.input}
    return graph_of(
        nodes,
        {"x": (element, (1, channels, 8, 8))},
        {name: value for name, value in constants.items() if name in used},
        opset=opset,
    )


def quantized_product(
    inputs: int,
    outputs: int,
    *,
    kind: str = "MatMul",
    axis: int | None = None,
    transposed: bool = False,
    through: bool = False,
) -> ModelProto:
    """x [1, 40, inputs] (or [40, inputs]) times an integer weight, both through Q/DQ."""
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    axis = (0 if transposed else 1) if axis is None else axis
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones(shape, np.int8),
        "ws": np.full(shape[axis], 0.1, np.float32),
        "wz": np.zeros(shape[axis], np.int8),
    }
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w ws wz", "wd", axis=axis),
    ]
    if through:
        nodes.append(node("Transpose", "wd", "wt", perm=[1, 0]))
    attributes = {"transB": 1} if kind == "Gemm" and transposed else {}
    nodes.append(node(kind, f"d {'wt' if through else 'wd'}", "y", **attributes))
    return graph_of(nodes, {"x": (F32, (40, inputs) if kind == "Gemm" else (1, 40, inputs))}, constants)


def attention(*, scores: bool, sums: bool) -> ModelProto:
    """softmax(q k^T / 4) v of [1, 2, 9, 16], of which either product is of integers."""
    nodes = [node("Transpose", "k", "kt", perm=[0, 1, 3, 2])]

    def integer(name: str) -> str:
        nodes.append(node("QuantizeLinear", f"{name} s z", f"{name}_q"))
        nodes.append(node("DequantizeLinear", f"{name}_q s z", f"{name}_d"))
        return f"{name}_d"

    first = [integer(name) if scores else name for name in ("q", "kt")]
    nodes.append(helper.make_node("MatMul", first, ["product"], "scores"))
    nodes += [node("Mul", "product quarter", "scaled"), node("Softmax", "scaled", "weights", axis=-1)]
    second = [integer(name) if sums else name for name in ("weights", "v")]
    nodes.append(helper.make_node("MatMul", second, ["y"], "sums"))
    constants = {"s": np.float32(0.1), "z": np.int8(0), "quarter": np.float32(0.25)}
    return graph_of(nodes, dict.fromkeys("qkv", (F32, (1, 2, 9, 16))), constants)


def activation(scale, zero) -> ModelProto:
    return graph_of(
        [node("QuantizeLinear", "x s z", "q", axis=1), node("DequantizeLinear", "q s z", "y", axis=1)],
        {"x": (F32, (1, 32, 8, 8))},
        {"s": scale, "z": zero},
    )


def concat(first: float, second: float) -> ModelProto:
    zero = {"z": np.int8(0), "a": np.float32(first), "b": np.float32(second)}
    nodes = []
    for name, scale in (("x", "a"), ("x2", "b")):
        nodes += [
            node("QuantizeLinear", f"{name} {scale} z", f"{name}q"),
            node("DequantizeLinear", f"{name}q {scale} z", f"{name}d"),
        ]
    nodes += [
        node("Concat", "xd x2d", "c", axis=1),
        node("QuantizeLinear", "c a z", "q"),
        node("DequantizeLinear", "q a z", "y"),
    ]
    return graph_of(nodes, {"x": (F32, (1, 32, 8, 8)), "x2": (F32, (1, 32, 8, 8))}, zero)


def transposed_conv(scales: int) -> ModelProto:
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones((32, 16, 2, 2), np.int8),
        "ws": np.full(scales, 0.1, np.float32) if scales > 1 else np.float32(0.1),
        "wz": np.zeros(scales, np.int8) if scales > 1 else np.int8(0),
    }
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w ws wz", "wd", axis=1),
        node("ConvTranspose", "d wd", "y"),
    ]
    return graph_of(nodes, {"x": (F32, (1, 32, 8, 8))}, constants)


def top_k(k: int | None) -> ModelProto:
    nodes = [helper.make_node("TopK", ["x", "k"], ["y", "i"], "the_TopK")]
    if k is None:
        nodes.insert(0, node("ReduceMax", "n", "k", keepdims=1))
        return graph_of(nodes, {"x": (F32, (1, 9000)), "n": (TensorProto.INT64, (3,))})
    return graph_of(nodes, {"x": (F32, (1, 9000))}, {"k": np.array([k], np.int64)})


def grid_sample(*, mode: str, rank: int = 4, opset: int = 19) -> ModelProto:
    space = (8,) * (rank - 2)
    return graph_of(
        [node("GridSample", "x g", "y", mode=mode)],
        {"x": (F32, (1, 4, *space)), "g": (F32, (1, *space, rank - 2))},
        opset=opset,
    )


def untyped() -> ModelProto:
    model = one("Relu")
    model.graph.output[0].type.Clear()
    return model


def control_flow(other: str = "NonZero") -> ModelProto:
    """An If with Relu on one side and `other` on the other."""

    def branch(kind: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(kind, ["x"], ["b"], f"inner_{kind}")],
            kind,
            [],
            [helper.make_empty_tensor_value_info("b")],
        )

    return graph_of(
        [node("If", "c", "y", then_branch=branch("Relu"), else_branch=branch(other))],
        {"x": (F32, (1, 4)), "c": (TensorProto.BOOL, ())},
    )


def scatter(reduction: str = "") -> ModelProto:
    return graph_of(
        [node("ScatterND", "x i u", "y", **({"reduction": reduction} if reduction else {}))],
        {"x": (F32, (4, 4)), "u": (F32, (1, 4))},
        {"i": np.array([[1]], np.int64)},
    )


def conv_then(*, batch_norm: bool = False, scaled: tuple[int, ...] | None = None) -> ModelProto:
    constants = {"w": np.ones((32, 32, 1, 1), np.float32)}
    nodes = [node("Conv", "x w", "c")]
    if batch_norm:
        constants.update({name: np.ones(32, np.float32) for name in ("g", "b", "m", "v")})
        nodes.append(node("BatchNormalization", "c g b m v", "y"))
    elif scaled is not None:
        constants["g"] = np.ones(scaled, np.float32)
        nodes.append(node("Mul", "c g", "y"))
    return graph_of(nodes, {"x": (F32, (1, 32, 8, 8))}, constants)


def damaged() -> ModelProto:
    """A weight of fewer bytes than its sizes need."""
    model = conv_then()
    model.graph.initializer[0].raw_data = b"short"
    return model


def layer_norm(native: bool) -> ModelProto:
    if native:
        return graph_of(
            [node("LayerNormalization", "x g", "y")], {"x": (F32, (1, 4, 8))}, {"g": np.ones(8, np.float32)}
        )
    nodes = [
        node("ReduceMean", "x", "m", axes=[-1]),
        node("Sub", "x m", "d"),
        node("Mul", "d d", "s"),
        node("ReduceMean", "s", "v", axes=[-1]),
        node("Add", "v e", "p"),
        node("Sqrt", "p", "r"),
        node("Div", "d r", "y"),
    ]
    return graph_of(nodes, {"x": (F32, (1, 4, 8))}, {"e": np.float32(1e-5)}, opset=17)


def binary(kind: str, second: int, constant=None) -> ModelProto:
    if constant is not None:
        return graph_of([node(kind, "x c", "y")], {"x": (F32, (1, 4))}, {"c": constant})
    return graph_of([node(kind, "x x2", "y")], {"x": (F32, (1, 4)), "x2": (second, (1, 4))})


def where(third: int) -> ModelProto:
    return graph_of(
        [node("Where", "c x x2", "y")], {"c": (TensorProto.BOOL, (1, 4)), "x": (F32, (1, 4)), "x2": (third, (1, 4))}
    )


def named_size(first: int | str, height: int | str) -> ModelProto:
    return graph_of([node("Relu", "x", "y")], {"x": (F32, (first, 3, height, 8))})


def shapes_left(fixed: bool) -> ModelProto:
    return graph_of([node("Shape", "x", "s"), node("Reshape", "x s", "y")], {"x": (F32, (1 if fixed else "batch", 4))})


def custom(domain: str, kind: str) -> ModelProto:
    return graph_of([node(kind, "x", "y", domain=domain)], {"x": (F32, (1, 4))}, domains=[domain] if domain else ())


def not_imported() -> ModelProto:
    """A node of a domain that the file does not import: inference gives up."""
    return graph_of([node("Relu", "x", "y", domain="org.example")], {"x": (F32, (1, 4))})
