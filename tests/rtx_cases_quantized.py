"""More graphs for rtx_cases: QuantizeLinear and DequantizeLinear in every form that an exporter has been seen to write."""
# ruff: noqa: E501  (a graph is one line, as far as it goes)

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper
from rtx_cases import CASES, add, floats  # noqa: F401

X = "float[1,4,8,8] x"
W8 = floats("w", 4, 4, 1, 1, kind="int8", value=3)
WF = floats("w", 4, 4, 1, 1)
S = "float s = {0.1}"
Z = "int8 z = {0}"
ROUND = "q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, s, z)"


def pair(name: str, inputs: str = X, body: str = ROUND, weights: str = f"{S}, {Z}", **more: object) -> None:
    add(f"quantized/{name}", inputs, body, weights=weights, **more)  # type: ignore[arg-type]


def conv(
    name: str, weights: str, *, body: str = "", opset: int = 19, data: bool = True, kind: str = "float", **more: object
) -> None:
    """Q, DQ -> Conv <- DQ of an integer weight `w`; `body` makes the weight `wd`."""
    body = body or "wd = DequantizeLinear<axis=0>(w, ws, wz)"
    nodes = ("q = QuantizeLinear(x, s, z); d = DequantizeLinear(q, s, z); " if data else "") + body
    nodes += f"; y = Conv({'d' if data else 'x'}, wd)"
    first = (S if kind == "float" else "float16 s = {0.1}") + f", {Z}, " if data else ""
    add(
        f"quantized/conv-{name}",
        f"{kind}[1,4,8,8] x",
        nodes,
        weights=first + weights,
        opset=opset,
        outputs=f"{kind}[1,4,8,8] y",
        **more,
    )


pair("pair")
pair("pair-opset-13", opset=13)
pair("pair-opset-10", opset=10)
pair("zero-point-3", weights=f"{S}, int8 z = {{3}}")
pair("zero-point-uint8-0", weights=f"{S}, uint8 z = {{0}}")
pair("zero-point-uint8-128", weights=f"{S}, uint8 z = {{128}}")
pair("no-zero-point", body="q = QuantizeLinear(x, s); y = DequantizeLinear(q, s)", weights=S)
pair("no-zero-point-on-dq", body="q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, s)")
pair(
    "output-dtype-int8",
    body="q = QuantizeLinear<output_dtype=3>(x, s); y = DequantizeLinear(q, s)",
    weights=S,
    opset=21,
)
pair(
    "output-dtype-uint8",
    body="q = QuantizeLinear<output_dtype=2>(x, s); y = DequantizeLinear(q, s)",
    weights=S,
    opset=21,
)
pair(
    "output-dtype-int16",
    body="q = QuantizeLinear<output_dtype=5>(x, s); y = DequantizeLinear(q, s)",
    weights=S,
    opset=21,
)
pair(
    "output-dtype-fp8",
    body="q = QuantizeLinear<output_dtype=17>(x, s); y = DequantizeLinear(q, s)",
    weights=S,
    opset=21,
)
pair(
    "output-dtype-fp8e5m2",
    body="q = QuantizeLinear<output_dtype=19>(x, s); y = DequantizeLinear(q, s)",
    weights=S,
    opset=21,
)
pair(
    "output-dtype-int4",
    body="q = QuantizeLinear<output_dtype=22>(x, s); y = DequantizeLinear(q, s)",
    weights=S,
    opset=21,
)
pair("fp8-zero-point", weights=f"{S}, float8e4m3fn z = {{0}}")
pair("fp8-half", "float16[1,4,8,8] x", weights="float16 s = {0.1}, float8e4m3fn z = {0}")
pair("int16-zero-point", weights=f"{S}, int16 z = {{0}}", opset=21)
pair("scale-zero", weights=f"float s = {{0}}, {Z}")
pair("scale-negative", weights=f"float s = {{-0.1}}, {Z}")
pair("scale-one-element", weights="float[1] s = {0.1}, int8[1] z = {0}")
pair("scale-half", weights=f"float16 s = {{0.1}}, {Z}", outputs="float[1,4,8,8] y")
pair("scale-double", weights=f"double s = {{0.1}}, {Z}", outputs="float[1,4,8,8] y")
pair("half", "float16[1,4,8,8] x", weights=f"float16 s = {{0.1}}, {Z}")
pair("half-opset-17", "float16[1,4,8,8] x", weights=f"float16 s = {{0.1}}, {Z}", opset=17)
pair("half-float-scale", "float16[1,4,8,8] x", outputs="float[1,4,8,8] y")
pair("scale-computed", "float[1,4,8,8] x, float s", weights=Z)
pair("scale-behind-identity", body="t = Identity(s); q = QuantizeLinear(x, t, z); y = DequantizeLinear(q, t, z)")
pair(
    "scale-behind-cast",
    body="t = Cast<to=1>(s); q = QuantizeLinear(x, t, z); y = DequantizeLinear(q, t, z)",
    weights=f"float16 s = {{0.1}}, {Z}",
)
pair(
    "scale-behind-two-casts",
    body="h = Cast<to=10>(s); t = Cast<to=1>(h); q = QuantizeLinear(x, t, z); y = DequantizeLinear(q, t, z)",
)
pair(
    "scale-constant-node",
    body="s = Constant<value = float {0.1}>(); q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, s, z)",
    weights=Z,
)
pair(
    "scale-constant-float",
    body="s = Constant<value_float = 0.1>(); q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, s, z)",
    weights=Z,
)
pair(
    "scale-behind-reshape",
    body="t = Reshape(s, e); q = QuantizeLinear(x, t, z); y = DequantizeLinear(q, t, z)",
    weights="float[1] s = {0.1}, int64[1] e = {1}, int8[1] z = {0}",
)
pair("scale-product", body="t = Mul(s, s); q = QuantizeLinear(x, t, z); y = DequantizeLinear(q, t, z)")
pair("zero-behind-identity", body="e = Identity(z); q = QuantizeLinear(x, s, e); y = DequantizeLinear(q, s, e)")
pair(
    "zero-constant-node",
    body="z = Constant<value = int8 {0}>(); q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, s, z)",
    weights=S,
)
pair(
    "zero-behind-cast",
    body="e = Cast<to=3>(z); q = QuantizeLinear(x, s, e); y = DequantizeLinear(q, s, e)",
    weights=f"{S}, int32 z = {{0}}",
)
pair("zero-computed", "float[1,4,8,8] x, int8 z", weights=S)
FOUR = floats("s", 4, value=0.1)
ZEROS = floats("z", 4, kind="int8", value=0)
pair(
    "activation-per-channel",
    body="q = QuantizeLinear<axis=1>(x, s, z); y = DequantizeLinear<axis=1>(q, s, z)",
    weights=f"{FOUR}, {ZEROS}",
)
pair(
    "zero-points-fewer",
    body="q = QuantizeLinear<axis=1>(x, s, z); y = DequantizeLinear<axis=1>(q, s, z)",
    weights=f"{FOUR}, {Z}",
)
pair(
    "axis-outside",
    body="q = QuantizeLinear<axis=7>(x, s, z); y = DequantizeLinear<axis=7>(q, s, z)",
    weights=f"{FOUR}, {ZEROS}",
)
pair("scalar-input", "float x")
pair("quantize-only", body="y = QuantizeLinear(x, s, z)")
pair("dequantize-only", "int8[1,4,8,8] x", "y = DequantizeLinear(x, s, z)")
pair("dequantize-int32", "int32[1,4,8,8] x", "y = DequantizeLinear(x, s)", weights=S)
pair("dequantize-uint8-input", "uint8[1,4,8,8] x", "y = DequantizeLinear(x, s)", weights=S)
pair(
    "int8-relu-between",
    body="q = QuantizeLinear(x, s, z); r = Relu(q); y = DequantizeLinear(r, s, z)",
    outputs="float[1,4,8,8] y",
)
pair(
    "int8-transpose-between",
    body="q = QuantizeLinear(x, s, z); r = Transpose<perm=[0,2,3,1]>(q); y = DequantizeLinear(r, s, z)",
)
pair(
    "int8-reshape-between",
    body="q = QuantizeLinear(x, s, z); r = Reshape(q, t); y = DequantizeLinear(r, s, z)",
    weights=f"{S}, {Z}, int64[2] t = {{1, -1}}",
)
pair(
    "int8-maxpool-between",
    body="q = QuantizeLinear(x, s, z); r = MaxPool<kernel_shape=[2,2]>(q); y = DequantizeLinear(r, s, z)",
)
pair("int8-add-between", body="q = QuantizeLinear(x, s, z); r = Add(q, q); y = DequantizeLinear(r, s, z)")
pair("int8-cast-between", body="q = QuantizeLinear(x, s, z); r = Cast<to=1>(q); y = Relu(r)")
pair("bfloat16", "bfloat16[1,4,8,8] x", weights=f"bfloat16 s = {{0.1}}, {Z}")
pair(
    "other-scale",
    body="q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, t, z)",
    weights=f"{S}, float t = {{0.2}}, {Z}",
)

WS = floats("ws", 4, value=0.1)
WZ = floats("wz", 4, kind="int8", value=0)


def bias(model: ModelProto) -> None:
    """An int32 bias behind its own DequantizeLinear, as ONNX Runtime's quantizer writes it."""
    node = helper.make_node("DequantizeLinear", ["b", "ws"], ["bd"], axis=0)
    model.graph.node.insert(len(model.graph.node) - 1, node)
    model.graph.node[-1].input.append("bd")


conv("per-channel", f"{W8}, {WS}, {WZ}")
conv("no-zero-point", f"{W8}, {WS}", body="wd = DequantizeLinear<axis=0>(w, ws)")
conv("no-zero-point-scalar", f"{W8}, float ws = {{0.1}}", body="wd = DequantizeLinear(w, ws)")
conv(
    "float-weight",
    f"{WF}, {WS}, {WZ}",
    body="wq = QuantizeLinear<axis=0>(w, ws, wz); wd = DequantizeLinear<axis=0>(wq, ws, wz)",
)
conv("opset-12", f"{W8}, {WS}, {WZ}", opset=12)
conv("axis-1", f"{W8}, {WS}, {WZ}", body="wd = DequantizeLinear<axis=1>(w, ws, wz)")
conv("axis-default", f"{W8}, {WS}, {WZ}", body="wd = DequantizeLinear(w, ws, wz)")
conv("axis-negative", f"{W8}, {WS}, {WZ}", body="wd = DequantizeLinear<axis=-4>(w, ws, wz)")
conv("fewer-scales", f"{W8}, {floats('ws', 3, value=0.1)}, {floats('wz', 3, kind='int8', value=0)}")
conv("weight-zero-point", f"{W8}, {WS}, {floats('wz', 4, kind='int8', value=1)}")
conv(
    "uint8-weight", f"{floats('w', 4, 4, 1, 1, kind='uint8', value=3)}, {WS}, {floats('wz', 4, kind='uint8', value=0)}"
)
conv(
    "uint8-weight-128",
    f"{floats('w', 4, 4, 1, 1, kind='uint8', value=3)}, {WS}, {floats('wz', 4, kind='uint8', value=128)}",
)
conv("half", f"{W8}, {floats('ws', 4, kind='float16', value=0.1)}, {WZ}", kind="float16")
conv("weight-only", f"{W8}, {WS}, {WZ}", data=False)
conv("data-only", WF, body="wd = Identity(w)")
conv(
    "weight-input",
    WS + ", " + WZ,
    data=True,
    change=lambda model: model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT8, (4, 4, 1, 1))),
)
conv(
    "scales-behind-cast",
    f"{W8}, {floats('ws16', 4, kind='float16', value=0.1)}, {WZ}",
    body="ws = Cast<to=1>(ws16); wd = DequantizeLinear<axis=0>(w, ws, wz)",
)
conv("scale-per-channel-zero", f"{W8}, float[4] ws = {{0.1, 0, 0.1, 0.1}}, {WZ}")
conv(
    "fp8-weight",
    f"{floats('w', 4, 4, 1, 1, kind='float8e4m3fn', value=1)}, float ws = {{0.1}}",
    body="wd = DequantizeLinear(w, ws)",
    data=False,
)
conv("int32-bias", f"{W8}, {WS}, {WZ}, {floats('b', 4, kind='int32', value=1)}", change=bias)
conv(
    "block",
    f"{W8}, {floats('ws', 4, 2, 1, 1, value=0.1)}",
    body="wd = DequantizeLinear<axis=1, block_size=2>(w, ws)",
    opset=21,
)


def four_bits(name: str, kind: int, scales: tuple[int, ...], **attributes: int) -> None:
    """x times an INT4 weight [32, 32] that is restored per tensor, per channel or per block."""
    add(
        f"quantized/{name}",
        "float[4,32] x",
        "wd = DequantizeLinear(w, ws); y = MatMul(x, wd)",
        opset=21,
        outputs="float[4,32] y",
        change=lambda model: _four_bits(model, kind, scales, attributes),
    )


def _four_bits(model: ModelProto, kind: int, scales: tuple[int, ...], attributes: dict[str, int]) -> None:
    size = int(np.prod(scales))
    model.graph.initializer.append(helper.make_tensor("w", kind, (32, 32), [1] * 1024))
    model.graph.initializer.append(helper.make_tensor("ws", TensorProto.FLOAT, scales, [0.1] * size))
    for key, value in attributes.items():
        model.graph.node[0].attribute.append(helper.make_attribute(key, value))


four_bits("int4-tensor", TensorProto.INT4, ())
four_bits("int4-channel", TensorProto.INT4, (32,), axis=1)
four_bits("int4-block", TensorProto.INT4, (2, 32), axis=0, block_size=16)
four_bits("int4-block-64", TensorProto.INT4, (1, 32), axis=0, block_size=64)
four_bits("uint4-block", TensorProto.UINT4, (2, 32), axis=0, block_size=16)
four_bits("int8-block", TensorProto.INT8, (2, 32), axis=0, block_size=16)
four_bits("int8-channel", TensorProto.INT8, (32,), axis=1)

PRODUCT = "q = QuantizeLinear(x, s, z); d = DequantizeLinear(q, s, z); wd = DequantizeLinear<axis={0}>(w, ws, wz); y = MatMul(d, wd)"
for axis in (0, 1):
    add(
        f"quantized/matmul-axis-{axis}",
        "float[4,32] x",
        PRODUCT.format(axis),
        weights=", ".join(
            [
                S,
                Z,
                floats("w", 32, 32, kind="int8", value=1),
                floats("ws", 32, value=0.1),
                floats("wz", 32, kind="int8", value=0),
            ]
        ),
    )
add(
    "quantized/gemm-transposed",
    "float[4,32] x",
    PRODUCT.format(0).replace("MatMul(", "Gemm<transB=1>("),
    weights=", ".join(
        [
            S,
            Z,
            floats("w", 16, 32, kind="int8", value=1),
            floats("ws", 16, value=0.1),
            floats("wz", 16, kind="int8", value=0),
        ]
    ),
)
add(
    "quantized/both-activations",
    "float[1,4,8] x, float[1,8,4] b",
    "q = QuantizeLinear(x, s, z); d = DequantizeLinear(q, s, z); "
    "p = QuantizeLinear(b, s, z); e = DequantizeLinear(p, s, z); y = MatMul(d, e)",
    weights=f"{S}, {Z}",
)
TRANSPOSED = floats("w", 4, 4, 2, 2, kind="int8", value=1)
add(
    "quantized/transposed-conv",
    X,
    "q = QuantizeLinear(x, s, z); d = DequantizeLinear(q, s, z); "
    "wd = DequantizeLinear<axis=1>(w, ws, wz); y = ConvTranspose(d, wd)",
    weights=", ".join([S, Z, TRANSPOSED, WS, WZ]),
)
add(
    "quantized/transposed-conv-tensor",
    X,
    "q = QuantizeLinear(x, s, z); d = DequantizeLinear(q, s, z); "
    "wd = DequantizeLinear(w, ws, z); y = ConvTranspose(d, wd)",
    weights=", ".join([S, Z, TRANSPOSED, "float ws = {0.1}"]),
)
add(
    "quantized/relu-between",
    X,
    "q = QuantizeLinear(x, s, z); d = DequantizeLinear(q, s, z); "
    "wd = DequantizeLinear<axis=0>(w, ws, wz); c = Conv(d, wd); cq = QuantizeLinear(c, s, z); cd = DequantizeLinear(cq, s, z); "
    "y = Relu(cd)",
    weights=", ".join([S, Z, W8, WS, WZ]),
)
add(
    "quantized/small-product",
    "float[4,8] x",
    PRODUCT.format(1),
    weights=", ".join(
        [
            S,
            Z,
            floats("w", 8, 2, kind="int8", value=1),
            floats("ws", 2, value=0.1),
            floats("wz", 2, kind="int8", value=0),
        ]
    ),
)
# Both products of an attention on integers; the probabilities between them are quantized as well.
BOTH = "{0}q = QuantizeLinear({0}, s, z); {0}d = DequantizeLinear({0}q, s, z); "
add(
    "quantized/attention-products",
    "float[1,2,16,16] x",
    BOTH.format("x")
    + "t = Transpose<perm=[0,1,3,2]>(xd); k = Identity(t); "
    + BOTH.format("k")
    + "a = MatMul(xd, kd); p = Softmax(a); "
    + BOTH.format("p")
    + "y = MatMul(pd, xd)",
    weights=f"{S}, {Z}",
    outputs="float[1,2,16,16] y",
)
