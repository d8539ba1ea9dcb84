"""Small graphs, good and bad, on which lint is held against NVIDIA's parser and builder: one line or two each.

A graph is written in ONNX's own text form. The types and shapes of its outputs are inferred, unless they are given.
"""
# ruff: noqa: E501  (a graph is one line, as far as it goes)

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

CASES: dict[str, ModelProto] = {}
IMAGE, ROW, MATRIX = "float[1,4,8,8] x", "float[1,4] x", "float[4,8] x"
PAIR = "float[1,4] x, float[1,4] z"


def graph(
    inputs: str,
    body: str,
    *,
    weights: str = "",
    outputs: str = "y",
    opset: int = 19,
    domains: str = "",
    functions: str = "",
) -> ModelProto:
    """A model from text; `body` has nodes separated by `;`."""
    nodes = "\n".join(f"   {line.strip()}" for line in body.split(";"))
    opsets = ", ".join([f'"" : {opset}', *(f'"{name}" : 1' for name in domains.split())])
    model = onnx.parser.parse_model(
        f"<ir_version: {10 if opset > 20 else 9}, opset_import: [{opsets}]>\n"
        f"g ({inputs}) => ({outputs}) {{\n{nodes}\n}}\n{functions}"
    )
    model.graph.initializer.extend(tensors(weights))
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return model
    for item, known in zip(model.graph.output, inferred.graph.output):
        if not item.type.tensor_type.elem_type:
            item.CopyFrom(known)
    return model


def tensors(words: str) -> list[TensorProto]:
    """Constants from text: `float[2] w = {1, 2}, int8 z = {0}`; ONNX's own text has no numbers of 16 and 8 bits."""
    kinds = {TensorProto.DataType.Name(kind).lower(): kind for kind in TensorProto.DataType.values()}
    found = re.findall(r"(\w+)(?:\[([\d,]*)\])? (\w+) = \{([^}]*)\}", words)
    return [
        helper.make_tensor(
            name,
            kinds[kind],
            [int(size) for size in sizes.split(",") if size],
            [float(number) if "float" in kind or kind == "double" else int(number) for number in numbers.split(",")],
        )
        for kind, sizes, name, numbers in found
    ]


def add(
    name: str, inputs: str, body: str, *, change: Callable[[ModelProto], object] | None = None, **more: object
) -> None:
    model = graph(inputs, body, **more)  # type: ignore[arg-type]
    if change is not None:
        change(model)
    assert name not in CASES, name
    CASES[name] = model


def floats(name: str, *shape: int, kind: str = "float", value: float = 0.5) -> str:
    """A constant tensor in text."""
    numbers = ", ".join([str(value)] * int(np.prod(shape)))
    return f"{kind}[{','.join(map(str, shape))}] {name} = {{{numbers}}}"


# Operators of ONNX, each in its plainest form; the parser has some of them and not others.
for kind in (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity "
    "LeakyRelu Log Neg Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt "
    "Tan Tanh ThresholdedRelu LogSoftmax Hardmax Mish IsNaN IsInf"
).split():
    add(f"operator/{kind}", ROW, f"y = {kind}(x)")
for kind in ("Gelu",):
    add(f"operator/{kind}", ROW, f"y = {kind}(x)", opset=20)
add("operator/Swish", ROW, "y = Swish(x)", opset=24)
add("operator/Det", "float[2,3,3] x", "y = Det(x)")
add("operator/Unique", "float[8] x", "y = Unique(x)", outputs="float[n] y")
add("operator/Compress", "float[8] x, bool[8] c", "y = Compress(x, c)", outputs="float[n] y")
add("operator/NonZero", ROW, "y = NonZero(x)")
add("operator/Bernoulli", ROW, "y = Bernoulli(x)")
add("operator/Multinomial", ROW, "y = Multinomial(x)")
add(
    "operator/AffineGrid", "float[1,2,3] x", "y = AffineGrid(x, size)", weights="int64[4] size = {1, 1, 4, 4}", opset=20
)
add(
    "operator/Col2Im",
    "float[1,4,4] x",
    "y = Col2Im(x, image, block)",
    weights="int64[2] image = {4, 4}, int64[2] block = {2, 2}",
    outputs="float[1,1,4,4] y",
)
add("operator/CenterCropPad", MATRIX, "y = CenterCropPad(x, s)", weights="int64[2] s = {2, 4}")
add(
    "operator/MaxUnpool",
    "float[1,1,2,2] x, int64[1,1,2,2] i",
    "y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(x, i)",
    outputs="float[1,1,4,4] y",
)
add("operator/MaxRoiPool", "float[1,1,8,8] x, float[2,5] r", "y = MaxRoiPool<pooled_shape=[2,2]>(x, r)")
add(
    "operator/RoiAlign",
    "float[1,1,8,8] x, float[2,4] r",
    "y = RoiAlign<output_height=2, output_width=2>(x, r, i)",
    weights="int64[2] i = {0, 0}",
)
add("operator/MeanVarianceNormalization", IMAGE, "y = MeanVarianceNormalization(x)")
add("operator/DFT", "float[1,8,1] x", "y = DFT(x)", outputs="float[1,8,2] y")
add("operator/BitwiseAnd", "int32[4] x, int32[4] z", "y = BitwiseAnd(x, z)")
add("operator/BitShift", "uint8[4] x, uint8[4] z", 'y = BitShift<direction="LEFT">(x, z)')
add("operator/NegativeLogLikelihoodLoss", "float[2,3] x, int64[2] t", "y = NegativeLogLikelihoodLoss(x, t)")
add("operator/HannWindow", "float[4] x", "w = HannWindow(n); y = Add(x, w)", weights="int64 n = {4}")
add("operator/RandomNormal", ROW, "n = RandomNormal<shape=[1,4]>(); y = Add(x, n)")
add("operator/DynamicQuantizeLinear", ROW, "y, s, z = DynamicQuantizeLinear(x)")
add("operator/MatMulInteger", "int8[4,8] x", "y = MatMulInteger(x, w)", weights=floats("w", 8, 8, kind="int8", value=1))
add(
    "operator/QLinearMatMul",
    "int8[4,8] x",
    "y = QLinearMatMul(x, s, z, w, s, z, s, z)",
    weights=floats("w", 8, 8, kind="int8", value=1) + ", float s = {0.1}, int8 z = {0}",
)
add(
    "operator/ConvInteger",
    "int8[1,1,4,4] x",
    "y = ConvInteger(x, w)",
    weights=floats("w", 1, 1, 2, 2, kind="int8", value=1),
)
add("operator/unknown-name", ROW, "y = NotAnOperator(x)", outputs="float[1,4] y")
add("operator/misspelt-name", ROW, "y = relu(x)", outputs="float[1,4] y")
add("operator/old-name", ROW, "y = Upsample(x, s)", weights="float[2] s = {1, 2}", opset=9)
add(
    "operator/retired",
    ROW,
    "y = Scatter(x, i, u)",
    opset=10,
    weights="int64[1,2] i = {0, 0}, float[1,2] u = {1, 2}",
    outputs="float[1,4] y",
)
add("operator/ParametricSoftplus", ROW, "y = ParametricSoftplus<alpha=1.0, beta=1.0>(x)", outputs="float[1,4] y")

# Domains and local functions.
add("domain/microsoft", ROW, "y = com.microsoft.Gelu(x)", domains="com.microsoft", outputs="float[1,4] y")
add("domain/plugin", ROW, "y = trt.plugins.Magic_TRT(x)", domains="trt.plugins", outputs="float[1,4] y")
add("domain/own", ROW, "y = org.example.Magic(x)", domains="org.example", outputs="float[1,4] y")
add("domain/not-imported", ROW, "y = org.example.Magic(x)", outputs="float[1,4] y")
add("domain/known-name", ROW, "y = org.example.Relu(x)", domains="org.example", outputs="float[1,4] y")
add(
    "domain/ai.onnx.ml",
    ROW,
    "y = ai.onnx.ml.Scaler<offset=[0.0], scale=[1.0]>(x)",
    domains="ai.onnx.ml",
    outputs="float[1,4] y",
)
FUNCTION = '<domain: "org.example", opset_import: ["" : 19]>\nTwice (a) => (b) {{ b = {0}(a{1}) }}'
add(
    "domain/function",
    ROW,
    "y = org.example.Twice(x)",
    domains="org.example",
    outputs="float[1,4] y",
    functions=FUNCTION.format("Add", ", a"),
)
add(
    "domain/function-with-unknown",
    ROW,
    "y = org.example.Twice(x)",
    domains="org.example",
    outputs="float[1,4] y",
    functions=FUNCTION.format("Det", ""),
)

# Sequences, optionals, strings.
add(
    "sequence/construct",
    ROW,
    "s = SequenceConstruct(x, x); y = SequenceAt(s, i)",
    weights="int64 i = {0}",
    outputs="float[1,4] y",
)
add("sequence/split", ROW, "s = SplitToSequence<axis=1>(x); y = ConcatFromSequence<axis=1>(s)", outputs="float[1,4] y")
add("sequence/optional", ROW, "o = Optional(x); y = OptionalGetElement(o)", outputs="float[1,4] y")
add("string/input", "string[2] x", "y = Identity(x)")
add("string/compare", "string[2] x, string[2] z", "y = Equal(x, z)", opset=19)
add("string/concat", "string[2] x, string[2] z", "y = StringConcat(x, z)", opset=20)

# Element types of arithmetic.
for short, kind in (
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("double", "double"),
    ("int64", "int64"),
    ("int32", "int32"),
    ("int8", "int8"),
    ("uint8", "uint8"),
    ("int16", "int16"),
    ("uint32", "uint32"),
    ("uint64", "uint64"),
    ("uint16", "uint16"),
):
    add(f"type/Add-{short}", f"{kind}[1,4] x, {kind}[1,4] z", "y = Add(x, z)")
add("type/Add-bool", "bool[1,4] x", "y = And(x, x)")
for kind, types in {
    "Relu": "int32 int64 int8",
    "Neg": "int32 int8",
    "Abs": "int32 int8",
    "Sign": "int32",
    "MatMul": "int32",
    "Mul": "int64 int32 uint8",
    "Div": "int64 int32",
    "Sub": "int64",
    "Max": "int64 int32 int8 uint8",
    "Equal": "int64 bool",
    "Less": "int32",
    "Concat": "int64 bool uint8 int8",
    "Pow": "int32",
    "Xor": "bool",
    "Or": "bool",
}.items():
    for kind_of in types.split():
        extra = "<axis=0>" if kind == "Concat" else ""
        one = kind in ("Relu", "Neg", "Abs", "Sign")
        add(
            f"type/{kind}-{kind_of}",
            f"{kind_of}[4,4] x" + ("" if one else f", {kind_of}[4,4] z"),
            f"y = {kind}{extra}(x{'' if one else ', z'})",
        )
for kind, types in {
    "Softmax": "float16 double",
    "Exp": "float16 double",
    "Identity": "uint8 int8 bool double int16",
    "Transpose": "uint8 bool int8 int64",
    "Not": "bool",
    "Floor": "float16",
    "Erf": "float16",
    "ArgMax": "int32 int64 uint8",
    "Shape": "uint8 bool",
    "ReduceSum": "int64 int32",
    "ReduceMax": "int64 bool",
    "CumSum": "int64",
    "Trilu": "bool int64 uint8",
    "Flatten": "uint8",
}.items():
    for kind_of in types.split():
        weights = "int64 a = {0}" if kind == "CumSum" else ""
        opset = 20 if (kind, kind_of) == ("ReduceMax", "bool") else 19
        add(
            f"type/{kind}-{kind_of}",
            f"{kind_of}[4,4] x",
            f"y = {kind}(x{', a' if weights else ''})",
            weights=weights,
            opset=opset,
        )
add("type/uint8-input-cast", "uint8[1,4] x", "y = Cast<to=1>(x)")
add("type/uint8-inside", ROW, "a = Cast<to=2>(x); b = Add(a, a); y = Cast<to=1>(b)")
add("type/uint8-constant", "uint8[1,4] x", "b = Add(x, c); y = Cast<to=1>(b)", weights="uint8[1] c = {1}")
add("type/uint8-output", ROW, "y = Cast<to=2>(x)")
add("type/uint8-gather", "uint8[8,4] x", "y = Gather(x, i)", weights="int64[2] i = {0, 1}")
add("type/int8-gather", "int8[8,4] x", "y = Gather(x, i)", weights="int64[2] i = {0, 1}")
add("type/int8-output", ROW, "y = Cast<to=3>(x)")
add("type/double-cast", ROW, "a = Cast<to=11>(x); b = Mul(a, a); y = Cast<to=1>(b)")
add("type/double-constant", "double[1,4] x", "y = Mul(x, c)", weights="double c = {2}")
add("type/int16-cast", ROW, "y = Cast<to=5>(x)")
add("type/uint32-cast", ROW, "y = Cast<to=12>(x)")
add("type/bool-cast", ROW, "y = Cast<to=9>(x)")
add("type/fp8-cast", ROW, "y = Cast<to=17>(x)")
add("type/CastLike", "float[1,4] x, float16[1] z", "y = CastLike(x, z)")

# Operands whose types differ, and value_info that says otherwise.
add("mixed/Add", "float[1,4] x, float16[1,4] z", "y = Add(x, z)", outputs="float[1,4] y")
add("mixed/Mul-constant", ROW, "h = Cast<to=10>(x); y = Mul(h, c)", weights="float c = {2}", outputs="float16[1,4] y")
add("mixed/MatMul", "float16[4,8] x", "y = MatMul(x, w)", weights=floats("w", 8, 4), outputs="float16[4,4] y")
add("mixed/Conv", "float16[1,4,8,8] x", "y = Conv(x, w)", weights=floats("w", 4, 4, 1, 1), outputs="float16[1,4,8,8] y")
add(
    "mixed/Conv-bias",
    "float16[1,4,8,8] x",
    "y = Conv(x, w, b)",
    outputs="float16[1,4,8,8] y",
    weights=floats("w", 4, 4, 1, 1, kind="float16") + ", " + floats("b", 4),
)
add("mixed/Concat", "float[1,4] x, float16[1,4] z", "y = Concat<axis=0>(x, z)", outputs="float[2,4] y")
add("mixed/Where", "bool[1,4] c, float[1,4] x, float16[1,4] z", "y = Where(c, x, z)", outputs="float[1,4] y")
add("mixed/Pow", ROW, "y = Pow(x, e)", weights="int64 e = {2}")
add("mixed/Pow-half", "float16[1,4] x", "y = Pow(x, e)", weights="float e = {2}")
add(
    "mixed/LayerNormalization",
    "float16[1,4] x",
    "y = LayerNormalization(x, w)",
    weights=floats("w", 4),
    outputs="float16[1,4] y",
)
add("mixed/Clip", "float16[1,4] x", "y = Clip(x, c)", weights="float c = {0}", outputs="float16[1,4] y")
add(
    "mixed/Gemm",
    "float16[4,8] x",
    "y = Gemm(x, w, b)",
    outputs="float16[4,4] y",
    weights=floats("w", 8, 4, kind="float16") + ", " + floats("b", 4),
)
add("mixed/PRelu", "float16[1,4] x", "y = PRelu(x, s)", weights=floats("s", 4), outputs="float16[1,4] y")
add("mixed/Equal", "float[1,4] x, float16[1,4] z", "y = Equal(x, z)", outputs="bool[1,4] y")
add("mixed/Max", "float[1,4] x, float16[1,4] z", "y = Max(x, z)", outputs="float[1,4] y")
add("mixed/Add-int", "int64[1,4] x, int32[1,4] z", "y = Add(x, z)", outputs="int64[1,4] y")
add("mixed/GridSample", "float16[1,4,8,8] x, float[1,8,8,2] z", "y = GridSample(x, z)")
add("mixed/BatchNormalization", "float16[1,4,8,8] x", "y = BatchNormalization(x, w, w, w, w)", weights=floats("w", 4))
add(
    "mixed/ScatterND",
    "float[4,4] x",
    "y = ScatterND(x, i, u)",
    outputs="float[4,4] y",
    weights="int64[1,1] i = {1}, " + floats("u", 1, 4, kind="float16"),
)
add(
    "mixed/InstanceNormalization",
    "float16[1,4,8,8] x",
    "y = InstanceNormalization(x, w, w)",
    weights=floats("w", 4),
    outputs="float16[1,4,8,8] y",
)


def lie(name: str, kind: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, (1, 4)))

    return change


add("lying/good-graph", ROW, "h = Relu(x); y = Add(h, x)", change=lie("h", TensorProto.FLOAT16))
add(
    "lying/bad-graph",
    ROW,
    "h = Cast<to=10>(x); y = Add(h, x)",
    change=lie("h", TensorProto.FLOAT),
    outputs="float[1,4] y",
)
add(
    "lying/half-graph",
    "float16[1,4] x",
    "h = Relu(x); y = Mul(h, c)",
    weights="float16 c = {2}",
    change=lie("h", TensorProto.FLOAT),
)
add(
    "lying/half-against-float",
    "float16[1,4] x",
    "h = Relu(x); y = Mul(h, c)",
    weights="float c = {2}",
    change=lie("h", TensorProto.FLOAT),
    outputs="float[1,4] y",
)
add("lying/output-type", ROW, "y = Relu(x)", outputs="float16[1,4] y")
add("lying/output-shape", ROW, "y = Relu(x)", outputs="float[1,5] y")
add(
    "lying/shape",
    ROW,
    "h = Relu(x); y = Add(h, x)",
    change=lambda model: model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, (7, 9))),
)

# Convolution, pooling, resizing, sampling.
W = floats("w", 4, 4, 3, 3)
add("conv/2d", IMAGE, "y = Conv(x, w)", weights=W)
add("conv/1d", "float[1,4,8] x", "y = Conv(x, w)", weights=floats("w", 4, 4, 3))
add("conv/3d", "float[1,2,4,4,4] x", "y = Conv(x, w)", weights=floats("w", 2, 2, 3, 3, 3))
add("conv/4d", "float[1,2,4,4,4,4] x", "y = Conv(x, w)", weights=floats("w", 2, 2, 1, 1, 1, 1))
add("conv/dynamic-weight", "float[1,4,8,8] x, float[4,4,3,3] w", "y = Conv(x, w)")
add("conv/wrong-channels", IMAGE, "y = Conv(x, w)", weights=floats("w", 4, 3, 3, 3), outputs="float[1,4,6,6] y")
add("conv/wrong-groups", IMAGE, "y = Conv<group=3>(x, w)", weights=floats("w", 4, 1, 3, 3), outputs="float[1,4,6,6] y")
add("conv/depthwise", IMAGE, "y = Conv<group=4>(x, w)", weights=floats("w", 4, 1, 3, 3))
add("conv/same-upper", IMAGE, 'y = Conv<auto_pad="SAME_UPPER">(x, w)', weights=W)
add(
    "conv/transpose-wrong-channels",
    IMAGE,
    "y = ConvTranspose(x, w)",
    weights=floats("w", 3, 4, 3, 3),
    outputs="float[1,4,10,10] y",
)
add("conv/transpose", IMAGE, "y = ConvTranspose<strides=[2,2]>(x, w)", weights=W)
add("conv/transpose-output-shape", IMAGE, "y = ConvTranspose<strides=[2,2], output_shape=[16,16]>(x, w)", weights=W)
add(
    "conv/deformable",
    "float[1,4,8,8] x, float[1,18,6,6] o",
    "y = DeformConv(x, w, o)",
    weights=W,
    outputs="float[1,4,6,6] y",
)
add("pool/max", IMAGE, "y = MaxPool<kernel_shape=[2,2]>(x)")
add("pool/max-indices", IMAGE, "y, i = MaxPool<kernel_shape=[2,2]>(x)", outputs="y, i")
add("pool/max-indices-unused", IMAGE, "y, i = MaxPool<kernel_shape=[2,2]>(x)")
add("pool/max-dilated", IMAGE, "y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)")
add("pool/max-1d", "float[1,4,8] x", "y = MaxPool<kernel_shape=[2]>(x)")
add("pool/max-int8", "int8[1,4,8,8] x", "y = MaxPool<kernel_shape=[2,2]>(x)")
add("pool/average", IMAGE, "y = AveragePool<kernel_shape=[2,2], ceil_mode=1>(x)")
add("pool/average-dilated", IMAGE, "y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x)")
add("pool/average-4d", "float[1,2,4,4,4,4] x", "y = AveragePool<kernel_shape=[2,2,2,2]>(x)")
add("pool/lp", IMAGE, "y = LpPool<kernel_shape=[2,2]>(x)")
add("pool/global-average", IMAGE, "y = GlobalAveragePool(x)")
add("pool/global-lp", IMAGE, "y = GlobalLpPool(x)")
SIZES = "float[4] s = {1, 1, 2, 2}"
for mode in ("nearest", "linear", "cubic"):
    add(f"resize/{mode}", IMAGE, f'y = Resize<mode="{mode}">(x, , s)', weights=SIZES)
for where in (
    "half_pixel",
    "pytorch_half_pixel",
    "asymmetric",
    "align_corners",
    "tf_crop_and_resize",
    "half_pixel_symmetric",
):
    roi = "r" if where == "tf_crop_and_resize" else ""
    add(
        f"resize/{where}",
        IMAGE,
        f'y = Resize<mode="linear", coordinate_transformation_mode="{where}">(x, {roi}, s)',
        weights=SIZES + ", float[8] r = {0, 0, 0, 0, 1, 1, 1, 1}",
    )
add("resize/antialias", IMAGE, 'y = Resize<mode="linear", antialias=1>(x, , s)', weights=SIZES)
add(
    "resize/not-larger",
    IMAGE,
    'y = Resize<mode="linear", keep_aspect_ratio_policy="not_larger">(x, , , s)',
    weights="int64[4] s = {1, 4, 16, 16}",
    outputs="float[1,4,16,16] y",
)
add("resize/axes", IMAGE, 'y = Resize<mode="linear", axes=[2,3]>(x, , s)', weights="float[2] s = {2, 2}")
add("resize/sizes", IMAGE, 'y = Resize<mode="linear">(x, , , s)', weights="int64[4] s = {1, 4, 16, 16}")
add("resize/exclude-outside", IMAGE, 'y = Resize<mode="cubic", exclude_outside=1>(x, , s)', weights=SIZES)
for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
    add(f"resize/{rounding}", IMAGE, f'y = Resize<mode="nearest", nearest_mode="{rounding}">(x, , s)', weights=SIZES)
add("resize/int32", "int32[1,4,8,8] x", 'y = Resize<mode="nearest">(x, , s)', weights=SIZES)
add(
    "resize/computed",
    "float[1,4,8,8] x, float[1,4,16,16] z",
    'd = Shape(z); y = Resize<mode="linear">(x, , , d)',
    outputs="float[1,4,16,16] y",
)
GRID = "float[1,4,8,8] x, float[1,8,8,2] z"
for mode in ("bilinear", "nearest", "bicubic"):
    add(f"grid/{mode}-16", GRID, f'y = GridSample<mode="{mode}">(x, z)', opset=16)
for mode in ("linear", "nearest", "cubic"):
    add(f"grid/{mode}-20", GRID, f'y = GridSample<mode="{mode}">(x, z)', opset=20)
for padding in ("zeros", "border", "reflection"):
    add(f"grid/{padding}", GRID, f'y = GridSample<padding_mode="{padding}", align_corners=1>(x, z)', opset=16)
add("grid/3d", "float[1,4,4,4,4] x, float[1,4,4,4,3] z", "y = GridSample(x, z)", opset=20)
add("grid/int32", "int32[1,4,8,8] x, float[1,8,8,2] z", "y = GridSample(x, z)", opset=16)

# Normalization, attention, recurrence.
WB = floats("w", 8) + ", " + floats("b", 8)
for opset in (17, 19, 22):
    add(f"norm/layer-{opset}", MATRIX, "y = LayerNormalization(x, w, b)", weights=WB, opset=opset)
add("norm/layer-mean", MATRIX, "y, m = LayerNormalization(x, w, b)", weights=WB, outputs="y, m")
add("norm/layer-both", MATRIX, "y, m, d = LayerNormalization(x, w, b)", weights=WB, outputs="y, m, d")
add("norm/layer-unused", MATRIX, "y, m, d = LayerNormalization(x, w, b)", weights=WB)
add("norm/layer-axis-0", MATRIX, "y = LayerNormalization<axis=0>(x, w)", weights=floats("w", 4, 8))
add("norm/rms", MATRIX, "y = RMSNormalization(x, w)", weights=floats("w", 8), opset=23)
add(
    "norm/group-18",
    IMAGE,
    "y = GroupNormalization<num_groups=2>(x, w, b)",
    opset=18,
    outputs="float[1,4,8,8] y",
    weights=floats("w", 2) + ", " + floats("b", 2),
)
add(
    "norm/group-21",
    IMAGE,
    "y = GroupNormalization<num_groups=2>(x, w, b)",
    opset=21,
    outputs="float[1,4,8,8] y",
    weights=floats("w", 4) + ", " + floats("b", 4),
)
add("norm/instance", IMAGE, "y = InstanceNormalization(x, w, b)", weights=floats("w", 4) + ", " + floats("b", 4))
add("norm/batch", IMAGE, "y = BatchNormalization(x, w, w, w, w)", weights=floats("w", 4))
add(
    "norm/batch-training", IMAGE, "y, m, v = BatchNormalization<training_mode=1>(x, w, w, w, w)", weights=floats("w", 4)
)
add("norm/lp", MATRIX, "y = LpNormalization(x)")
add("norm/lrn", IMAGE, "y = LRN<size=3>(x)")
QKV = "float[1,2,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v"
add("attention/plain", QKV, "y = Attention(q, k, v)", opset=23)
add("attention/mask", QKV + ", float[1,1,4,4] m", "y = Attention(q, k, v, m)", opset=23)
add("attention/mask-2d", QKV + ", float[4,4] m", "y = Attention(q, k, v, m)", opset=23)
add("attention/bool-mask", QKV + ", bool[1,1,4,4] m", "y = Attention(q, k, v, m)", opset=23)
add("attention/causal", QKV, "y = Attention<is_causal=1>(q, k, v)", opset=23)
add(
    "attention/3d",
    "float[1,4,16] q, float[1,4,16] k, float[1,4,16] v",
    "y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)",
    opset=23,
)
add("attention/softcap", QKV, "y = Attention<softcap=2.0>(q, k, v)", opset=23)
add(
    "attention/past",
    QKV + ", float[1,2,3,8] pk, float[1,2,3,8] pv",
    "y, nk, nv = Attention(q, k, v, , pk, pv)",
    opset=23,
    outputs="y, nk, nv",
)
add("attention/scores", QKV, "y, , , s = Attention(q, k, v)", opset=23, outputs="y, s")
HALF = "float16[1,2,64,64] q, float16[1,2,64,64] k, float16[1,2,64,64] v"
add("attention/half", HALF, "y = Attention(q, k, v)", opset=23)
add("attention/half-scaled", HALF, "y = Attention<scale=0.125>(q, k, v)", opset=23)
add("attention/larger", HALF.replace("float16", "float"), "y = Attention(q, k, v)", opset=23)
add(
    "attention/rotary",
    "float[1,2,4,8] x",
    "y = RotaryEmbedding(x, c, c, p)",
    opset=23,
    weights=floats("c", 4, 4) + ", int64[1,4] p = {0, 1, 2, 3}",
    outputs="float[1,2,4,8] y",
)
LSTM = floats("w", 1, 16, 3) + ", " + floats("r", 1, 16, 4)
add("recurrent/lstm", "float[5,1,3] x", "y = LSTM<hidden_size=4>(x, w, r)", weights=LSTM)
add("recurrent/lstm-layout", "float[1,5,3] x", "y = LSTM<hidden_size=4, layout=1>(x, w, r)", weights=LSTM)
add("recurrent/lstm-input-forget", "float[5,1,3] x", "y = LSTM<hidden_size=4, input_forget=1>(x, w, r)", weights=LSTM)
add(
    "recurrent/gru",
    "float[5,1,3] x",
    "y = GRU<hidden_size=4>(x, w, r)",
    weights=floats("w", 1, 12, 3) + ", " + floats("r", 1, 12, 4),
)
add(
    "recurrent/rnn",
    "float[5,1,3] x",
    "y = RNN<hidden_size=4>(x, w, r)",
    weights=floats("w", 1, 4, 3) + ", " + floats("r", 1, 4, 4),
)

# Selection and movement.
for wanted, length in ((1, 5000), (3839, 5000), (3840, 5000), (3841, 5000), (8192, 8192), (4096, 4096)):
    add(f"topk/{wanted}-of-{length}", f"float[1,{length}] x", "y, i = TopK(x, k)", weights=f"int64[1] k = {{{wanted}}}")
add("topk/more-than-there", "float[1,8] x", "y, i = TopK(x, k)", weights="int64[1] k = {16}", outputs="float[1,16] y")
add("topk/unsorted", "float[1,80] x", "y, i = TopK<sorted=0>(x, k)", weights="int64[1] k = {8}")
add("topk/smallest-first-axis", "float[80,2] x", "y, i = TopK<axis=0, largest=0>(x, k)", weights="int64[1] k = {8}")
add("topk/constant-node", "float[1,5000] x", "k = Constant<value = int64[1] {4000}>(); y, i = TopK(x, k)")
add("topk/computed", "float[1,80] x, float[8] z", "k = Shape(z); y, i = TopK(x, k)", outputs="float[1,8] y")
add(
    "topk/behind-identity",
    "float[1,5000] x",
    "j = Identity(k); y, i = TopK(x, j)",
    weights="int64[1] k = {4000}",
    outputs="float[1,4000] y",
)
add(
    "topk/sort-all",
    "float[1,8192] x",
    "h = Shape(x); k = Gather(h, i); y, j = TopK(x, k)",
    outputs="float[1,8192] y",
    weights="int64[1] i = {1}",
)
add(
    "topk/sort-few",
    "float[1,300] x",
    "h = Shape(x); k = Slice(h, a, b); y, j = TopK(x, k)",
    outputs="float[1,300] y",
    weights="int64[1] a = {-1}, int64[1] b = {9}",
)
add(
    "topk/clipped",
    "float[1,8192] x",
    "h = Shape(x); n = Gather(h, i); k = Min(n, m); y, j = TopK(x, k)",
    outputs="float[1,300] y",
    weights="int64[1] i = {1}, int64[1] m = {300}",
)
add("topk/int32", "int32[1,80] x", "y, i = TopK(x, k)", weights="int64[1] k = {8}")
add("topk/indices", "float[1,80] x", "v, y = TopK(x, k)", weights="int64[1] k = {8}")
for reduction in ("none", "add", "mul", "max"):
    add(
        f"scatter/nd-{reduction}",
        "float[4,4] x",
        f'y = ScatterND<reduction="{reduction}">(x, i, u)',
        opset=18,
        weights="int64[1,1] i = {1}, " + floats("u", 1, 4),
    )
    add(
        f"scatter/elements-{reduction}",
        "float[4,4] x",
        f'y = ScatterElements<reduction="{reduction}">(x, i, u)',
        opset=18,
        weights="int64[1,4] i = {1, 1, 1, 1}, " + floats("u", 1, 4),
    )
add("gather/elements", "float[4,4] x", "y = GatherElements(x, i)", weights="int64[1,4] i = {0, 1, 2, 3}")
add("gather/nd", "float[4,4] x", "y = GatherND(x, i)", weights="int64[2,2] i = {0, 1, 2, 3}")
add("gather/nd-batch", "float[4,4] x", "y = GatherND<batch_dims=1>(x, i)", weights="int64[4,1] i = {0, 1, 2, 3}")
add("gather/scalar", "float[4,4] x", "y = Gather(x, i)", weights="int64 i = {-1}")
add("gather/int32-index", "float[4,4] x, int32[2] i", "y = Gather(x, i)")
add("gather/float-index", "float[4,4] x, float[2] i", "y = Gather(x, i)", outputs="float[2,4] y")
add("move/pad-reflect", IMAGE, 'y = Pad<mode="reflect">(x, p)', weights="int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}")
add("move/pad-wrap", IMAGE, 'y = Pad<mode="wrap">(x, p)', weights="int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}")
add("move/pad-computed", "float[1,4] x, int64[4] p", "y = Pad(x, p)", outputs="float[a,b] y")
add("move/pad-bool", "bool[1,4] x", "y = Pad(x, p)", weights="int64[4] p = {0, 1, 0, 1}")
add(
    "move/slice-steps",
    "float[4,8] x",
    "y = Slice(x, a, b, c, d)",
    weights="int64[1] a = {7}, int64[1] b = {-9}, int64[1] c = {1}, int64[1] d = {-2}",
)
add(
    "move/slice-computed-axes",
    "float[4,8] x, int64[1] c",
    "y = Slice(x, a, b, c)",
    weights="int64[1] a = {0}, int64[1] b = {2}",
    outputs="float[p,q] y",
)
add(
    "move/slice-few-starts",
    "float[4,8] x",
    "y = Slice(x, a, b)",
    weights="int64[1] a = {0}, int64[1] b = {2}",
    outputs="float[2,8] y",
)
add(
    "move/reshape-not-divisible",
    "float[2,3] x",
    "y = Reshape(x, s)",
    weights="int64[2] s = {4, -1}",
    outputs="float[4,n] y",
)
add("move/split-sizes", "float[4,8] x", "y, z = Split<axis=1>(x, s)", weights="int64[2] s = {3, 5}")
add("move/split-uneven", "float[4,8] x", "y, z, w = Split<axis=1, num_outputs=3>(x)", opset=18)
add("move/squeeze-computed-axes", "float[1,8] x, int64[1] a", "y = Squeeze(x, a)", outputs="float[8] y")
add("move/squeeze-all", "float[1,8] x", "y = Squeeze(x)")
add("move/unsqueeze", "float[8] x", "y = Unsqueeze(x, a)", weights="int64[2] a = {0, -1}")
add("move/tile", "float[2,3] x", "y = Tile(x, r)", weights="int64[2] r = {2, 1}")
add("move/expand", "float[1,3] x", "y = Expand(x, s)", weights="int64[2] s = {4, 3}")
add("move/reshape-zero", "float[2,3] x", "y = Reshape(x, s)", weights="int64[2] s = {0, -1}")
add("move/reshape-wrong", "float[2,3] x", "y = Reshape(x, s)", weights="int64[2] s = {4, 2}", outputs="float[4,2] y")
add("move/reverse", "float[4,2] x", "y = ReverseSequence(x, l)", weights="int64[2] l = {2, 4}")
add("move/onehot", "int64[3] x", "y = OneHot(x, d, v)", weights="int64 d = {5}, float[2] v = {0, 1}")
add(
    "move/onehot-computed-depth",
    "int64[3] x, int64 d",
    "y = OneHot(x, d, v)",
    weights="float[2] v = {0, 1}",
    outputs="float[3,n] y",
)
add("move/eyelike", "float[3,3] x", "e = EyeLike(x); y = Add(e, x)")
add(
    "move/range",
    "float[4] x",
    "r = Range(a, b, c); f = Cast<to=1>(r); y = Add(f, x)",
    weights="int64 a = {0}, int64 b = {4}, int64 c = {1}",
)
add("move/constant-of-shape", "float[2,2] x", "z = ConstantOfShape(s); y = Add(z, x)", weights="int64[2] s = {2, 2}")
add("move/depth-to-space", IMAGE, 'y = DepthToSpace<blocksize=2, mode="CRD">(x)')
add("move/space-to-depth", IMAGE, "y = SpaceToDepth<blocksize=2>(x)")
add(
    "move/nms",
    "float[1,8,4] x, float[1,1,8] s",
    "y = NonMaxSuppression(x, s, m, t, t)",
    outputs="int64[n,3] y",
    weights="int64 m = {4}, float t = {0.5}",
)
add("math/einsum", "float[2,3,4] x, float[2,4,5] z", 'y = Einsum<equation="bij,bjk->bik">(x, z)')
add("math/einsum-ellipsis", "float[2,3,4] x, float[2,4,5] z", 'y = Einsum<equation="...ij,...jk->...ik">(x, z)')
add("math/einsum-trace", "float[3,3] x", 'y = Einsum<equation="ii->i">(x)')
add("math/einsum-three", "float[2,3] x, float[3,4] z, float[4,5] w", 'y = Einsum<equation="ij,jk,kl->il">(x, z, w)')
add("math/cumsum", "float[2,3] x", "y = CumSum(x, a)", weights="int64 a = {1}")
add("math/cumsum-reverse", "float[2,3] x", "y = CumSum<exclusive=1, reverse=1>(x, a)", weights="int64 a = {-1}")
add("math/cumsum-computed-axis", "float[2,3] x, int64 a", "y = CumSum(x, a)")
add("math/mod-int", "int64[4] x, int64[4] z", "y = Mod(x, z)")
add("math/mod-float", "float[4] x, float[4] z", "y = Mod<fmod=1>(x, z)")
add("math/trilu", "float[3,3] x", "y = Trilu<upper=0>(x, k)", weights="int64 k = {1}")
add("math/reduce-axes-computed", "float[2,3] x, int64[1] a", "y = ReduceSum(x, a)", outputs="float[a,b] y")
add("math/reduce-l1", "float[2,3] x", "y = ReduceL1<axes=[1]>(x)", opset=13)
add("math/reduce-empty-axes", "float[2,3] x", "y = ReduceSum<noop_with_empty_axes=1>(x)")
add(
    "math/gemm",
    "float[4,8] x",
    "y = Gemm<transB=1, alpha=0.5>(x, w, b)",
    weights=floats("w", 4, 8) + ", " + floats("b", 4),
)
add("math/matmul-wrong", "float[4,8] x", "y = MatMul(x, w)", weights=floats("w", 7, 4), outputs="float[4,4] y")
add("math/matmul-vectors", "float[8] x", "y = MatMul(x, w)", weights=floats("w", 8))
add("math/add-wrong-shapes", "float[2,3] x, float[2,4] z", "y = Add(x, z)", outputs="float[2,3] y")
add("math/concat-wrong-shapes", "float[2,3] x, float[3,4] z", "y = Concat<axis=0>(x, z)", outputs="float[5,3] y")
add("math/concat-axis-outside", "float[2,3] x, float[2,3] z", "y = Concat<axis=5>(x, z)", outputs="float[4,3] y")
add("math/dropout", ROW, "y = Dropout(x)")
add("math/dropout-mask", ROW, "y, m = Dropout(x)", outputs="y, m")
add("math/clip-open", ROW, "y = Clip(x, , m)", weights="float m = {6}")
add("math/clip-int", "int32[1,4] x", "y = Clip(x, m)", weights="int32 m = {6}")

add("math/mod-float-as-integers", "float[4] x, float[4] z", "y = Mod(x, z)", outputs="float[4] y")
add("math/dropout-training-input", "float[4] x, bool t", "y = Dropout(x, r, t)", weights="float r = {0.5}")
add(
    "math/range-float16",
    "float16[4] x",
    "r = Range(a, b, c); y = Add(r, x)",
    outputs="float16[4] y",
    weights="float16 a = {0}, float16 b = {4}, float16 c = {1}",
)
add(
    "math/range-float",
    "float[4] x",
    "r = Range(a, b, c); y = Add(r, x)",
    weights="float a = {0}, float b = {4}, float c = {1}",
)
add("pool/lp-3", IMAGE, "y = LpPool<kernel_shape=[2,2], p=3>(x)")
add("pool/lp-1", IMAGE, "y = LpPool<kernel_shape=[2,2], p=1>(x)")
add(
    "resize/scales-as-input",
    "float[1,4,8,8] x, float[4] s",
    'y = Resize<mode="linear">(x, , s)',
    outputs="float[a,b,c,d] y",
)
add("attention/causal-and-mask", HALF + ", float16[1,1,64,64] m", "y = Attention<is_causal=1>(q, k, v, m)", opset=23)
add("attention/other-value-size", HALF.replace("64,64] v", "64,32] v"), "y = Attention(q, k, v)", opset=23)
add("attention/half-mask", HALF + ", float16[1,1,64,64] m", "y = Attention(q, k, v, m)", opset=23)
CACHE = "float[1,2,8,4] x, float[1,2,1,4] u"
for mode in ("linear", "circular"):
    add(
        f"scatter/tensor-{mode}",
        CACHE,
        f'y = TensorScatter<mode="{mode}">(x, u, i)',
        weights="int64[1] i = {3}",
        opset=24,
        outputs="float[1,2,8,4] y",
    )

# Control flow.
BRANCHES = (
    "then_branch = a () => (float[1,4] b) {{ b = {0}(x) }}, else_branch = e () => (float[1,4] d) {{ d = {1}(x) }}"
)
add("control/if", "bool c, float[1,4] x", f"y = If<{BRANCHES.format('Relu', 'Neg')}>(c)")
add("control/if-unknown-inside", "bool c, float[1,4] x", f"y = If<{BRANCHES.format('Relu', 'Bernoulli')}>(c)")
add("control/if-constant", ROW, f"y = If<{BRANCHES.format('Relu', 'Neg')}>(c)", weights="bool c = {1}")
add(
    "control/if-other-rank",
    "bool c, float[1,4] x",
    "y = If<then_branch = a () => (float[1,4] b) { b = Relu(x) }, "
    "else_branch = e () => (float d) { d = ReduceSum<keepdims=0>(x) }>(c)",
    outputs="float y",
)
add(
    "control/loop",
    ROW,
    "y = Loop<body = b (int64 i, bool c, float[1,4] s) => (bool k, float[1,4] t) "
    "{ k = Identity(c) t = Add(s, s) }>(n, c, x)",
    weights="int64 n = {3}, bool c = {1}",
)
add(
    "control/scan",
    "float[3,4] x",
    "z, y = Scan<num_scan_inputs=1, body = b (float[4] s, float[4] e) => (float[4] t, "
    "float[4] o) { t = Add(s, e) o = Identity(t) }>(s0, x)",
    weights=floats("s0", 4),
    outputs="float[3,4] y",
)

# Inputs whose sizes are open, empty tensors, scalars.
add("shape/open-batch", "float[n,4] x", "y = Relu(x)")
add("shape/open-height", "float[1,3,h,w] x", "y = Relu(x)")
add("shape/open-conv", "float[n,4,h,w] x", "y = Conv(x, w1)", weights=floats("w1", 4, 4, 3, 3))
add(
    "shape/open-channels",
    "float[1,c,8,8] x",
    "y = Conv(x, w1)",
    weights=floats("w1", 4, 4, 3, 3),
    outputs="float[1,4,6,6] y",
)
add("shape/open-reshape", "float[n,4] x", "y = Reshape(x, s)", weights="int64[3] s = {-1, 2, 2}")
add(
    "shape/no-rank",
    "float[1,4] x",
    "y = Relu(x)",
    change=lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
)
add("shape/scalar", "float x", "y = Relu(x)")
add("shape/scalar-constant", ROW, "y = Mul(x, c)", weights="float c = {2}")
add("shape/empty-input", "float[0,4] x", "y = Relu(x)")
add(
    "shape/empty-constant",
    ROW,
    "y = Concat<axis=0>(x, c)",
    change=lambda model: model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 4), np.float32), "c")),
    outputs="float[1,4] y",
)
add("shape/nine-dimensions", "float[1,1,1,1,1,1,1,1,2] x", "y = Relu(x)")
add("shape/eight-dimensions", "float[1,1,1,1,1,1,1,2] x", "y = Relu(x)")
add("shape/huge", "float[1,2147483647,64] x", "y = Relu(x)")
add("shape/shape-node", ROW, "y = Shape(x)")
add("shape/size-node", ROW, "y = Size(x)")
add("shape/int64-output", "int64[4] x", "y = Add(x, x)")

# The graph as a whole.
add(
    "whole/duplicate-node-names",
    ROW,
    "a = Relu(x); y = Relu(a)",
    change=lambda model: [setattr(node, "name", "same") for node in model.graph.node],
)
add("whole/no-node-names", ROW, "a = Relu(x); y = Relu(a)")
add("whole/unsorted", ROW, "a = Relu(x); y = Neg(a)", change=lambda model: model.graph.node.reverse())
add("whole/duplicate-tensor", ROW, "a = Relu(x); a = Neg(x); y = Abs(a)", outputs="float[1,4] y")
add("whole/dangling-input", ROW, "y = Add(x, nowhere)", outputs="float[1,4] y")
add("whole/cycle", ROW, "a = Add(x, y); y = Relu(a)", outputs="float[1,4] y")
add("whole/output-of-nothing", ROW, "a = Relu(x)", outputs="float[1,4] y")
add("whole/initializer-as-output", ROW, "a = Relu(x)", weights=floats("y", 2), outputs="float[2] y")
add("whole/input-as-output", ROW, "a = Relu(x)", outputs="float[1,4] x")
add("whole/unused-initializer", ROW, "y = Relu(x)", weights=floats("w", 2))
add(
    "whole/unused-string-initializer",
    ROW,
    "y = Relu(x)",
    change=lambda model: model.graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, (1,), [b"a"])),
)
add("whole/unused-int16-initializer", ROW, "y = Relu(x)", weights="int16[1] w = {1}")
for kind in "uint32 uint64 uint16 complex64 float8e5m2 double float8e4m3fn".split():
    add(
        f"whole/unused-{kind}-initializer",
        ROW,
        "y = Relu(x)",
        change=lambda model, kind=kind: model.graph.initializer.append(
            helper.make_tensor("w", TensorProto.DataType.Value(kind.upper()), (1,), [1])
        ),
    )
add("whole/unused-node", ROW, "a = Neg(x); y = Relu(x)")
add("whole/unused-unknown-node", ROW, "a = Det(x); y = Relu(x)")
add("whole/initializer-is-input", ROW + ", float[1,4] w", "y = Add(x, w)", weights=floats("w", 1, 4))
add("whole/no-nodes-but-constant", ROW, "c = Constant<value = float[1,4] {1, 2, 3, 4}>(); y = Add(x, c)")
add("whole/constant-float", ROW, "c = Constant<value_float = 2.0>(); y = Mul(x, c)")
add("whole/constant-ints", "float[2,2] x", "c = Constant<value_ints = [4]>(); y = Reshape(x, c)")
add("whole/constant-string", ROW, 'c = Constant<value_string = "a">(); y = Relu(x)')
add("whole/missing-attribute", "float[1,4] x, float[1,4] z", "y = Concat(x, z)", outputs="float[1,8] y")
add("whole/missing-input", ROW, "y = Add(x)", outputs="float[1,4] y")
add("whole/too-many-inputs", ROW, "y = Relu(x, x)", outputs="float[1,4] y")
add("whole/unknown-attribute", ROW, "y = Relu<color=3>(x)")
add(
    "whole/NaN-constant",
    ROW,
    "y = Add(x, c)",
    change=lambda model: model.graph.initializer.append(numpy_helper.from_array(np.float32("nan"), "c")),
    outputs="float[1,4] y",
)
add("whole/output-without-type", ROW, "y = Relu(x)", change=lambda model: model.graph.output[0].type.Clear())
add(
    "whole/output-without-shape",
    ROW,
    "y = Relu(x)",
    change=lambda model: model.graph.output[0].type.tensor_type.ClearField("shape"),
)
add("whole/opset-7", ROW, "y = Relu(x)", opset=7)
add("whole/opset-21", ROW, "y = Relu(x)", opset=21)
add("whole/opset-24", ROW, "y = Relu(x)", opset=24)
add("whole/opset-25", ROW, "y = Relu(x)", opset=25)
add("whole/opset-99", ROW, "y = Relu(x)", opset=99, outputs="float[1,4] y")
add(
    "whole/truncated-weight",
    IMAGE,
    "y = Conv(x, w)",
    weights=W,
    change=lambda model: (
        setattr(model.graph.initializer[0], "raw_data", b"\0" * 8)
        or model.graph.initializer[0].ClearField("float_data")
    ),
)

# What does not fit: parameters, axes, types and sizes.
add("fit/tile-axis", ROW, "y = Tile(x, r)", weights="int64[1] r = {2}", outputs="float[1,8] y")
add("fit/concat-ranks", "float[2,3] x, float[2,3,1] z", "y = Concat<axis=0>(x, z)", outputs="float[4,3] y")
add("fit/gemm-bad", "float[4,8] x", "y = Gemm(x, w)", weights=floats("w", 7, 4), outputs="float[4,4] y")
add("fit/gemm-rank3", "float[1,4,8] x", "y = Gemm(x, w)", weights=floats("w", 8, 4), outputs="float[4,4] y")
add("fit/softmax-axis", ROW, "y = Softmax<axis=5>(x)", outputs="float[1,4] y")
add("fit/transpose-perm", ROW, "y = Transpose<perm=[0,0]>(x)", outputs="float[1,1] y")
add("fit/unsqueeze-dup", ROW, "y = Unsqueeze(x, a)", weights="int64[2] a = {0, 0}", outputs="float[1,1,1,4] y")
add("fit/squeeze-not1", "float[2,4] x", "y = Squeeze(x, a)", weights="int64[1] a = {0}", outputs="float[4] y")
add("fit/gather-axis", "float[2,4] x", "y = Gather<axis=4>(x, i)", weights="int64[1] i = {0}", outputs="float[1,4] y")
add("fit/gather-outside", "float[2,4] x", "y = Gather(x, i)", weights="int64[1] i = {9}")
add(
    "fit/split-sum", "float[2,8] x", "y, z = Split<axis=1>(x, s)", weights="int64[2] s = {3, 3}", outputs="float[2,3] y"
)
add("fit/expand-bad", "float[2,3] x", "y = Expand(x, s)", weights="int64[2] s = {4, 5}", outputs="float[4,5] y")
add("fit/pad-wrong-length", ROW, "y = Pad(x, p)", weights="int64[3] p = {0, 1, 0}", outputs="float[1,5] y")
add("fit/bn-wrong", IMAGE, "y = BatchNormalization(x, w, w, w, w)", weights=floats("w", 3), outputs="float[1,4,8,8] y")
add("fit/ln-wrong", "float[4,8] x", "y = LayerNormalization(x, w)", weights=floats("w", 7), outputs="float[4,8] y")
add("fit/in-wrong", IMAGE, "y = InstanceNormalization(x, w, w)", weights=floats("w", 3), outputs="float[1,4,8,8] y")
add("fit/prelu-wrong", IMAGE, "y = PRelu(x, w)", weights=floats("w", 3, 1, 1), outputs="float[1,4,8,8] y")
add("fit/pool-rank2", "float[4,8] x", "y = MaxPool<kernel_shape=[2]>(x)", outputs="float[4,7] y")
add("fit/pool-larger", IMAGE, "y = MaxPool<kernel_shape=[20,20]>(x)", outputs="float[1,4,1,1] y")
add("fit/conv-larger", IMAGE, "y = Conv(x, w)", weights=floats("w", 4, 4, 9, 9), outputs="float[1,4,1,1] y")
add("fit/conv-bias-wrong", IMAGE, "y = Conv(x, w, b)", weights=floats("w", 4, 4, 1, 1) + ", " + floats("b", 3))
add("fit/conv-rank-mismatch", IMAGE, "y = Conv(x, w)", weights=floats("w", 4, 4, 3), outputs="float[1,4,8,8] y")
add(
    "fit/resize-scales-2",
    IMAGE,
    'y = Resize<mode="linear">(x, , s)',
    weights="float[2] s = {2, 2}",
    outputs="float[1,4,16,16] y",
)
add(
    "fit/resize-both",
    IMAGE,
    'y = Resize<mode="linear">(x, , s, t)',
    weights="float[4] s = {1,1,2,2}, int64[4] t = {1,4,16,16}",
    outputs="float[1,4,16,16] y",
)
add("fit/resize-none", IMAGE, 'y = Resize<mode="linear">(x)', outputs="float[1,4,16,16] y")
add("fit/resize-area", IMAGE, 'y = Resize<mode="area">(x, , s)', weights=SIZES)
add("fit/grid-batch", "float[1,4,8,8] x, float[2,8,8,2] z", "y = GridSample(x, z)", outputs="float[1,4,8,8] y")
add("fit/grid-last", "float[1,4,8,8] x, float[1,8,8,3] z", "y = GridSample(x, z)", outputs="float[1,4,8,8] y")
add("fit/grid-mode", GRID, 'y = GridSample<mode="lanczos">(x, z)')
add("fit/einsum-bad", "float[2,3] x, float[4,5] z", 'y = Einsum<equation="ij,jk->ik">(x, z)', outputs="float[2,5] y")
add("fit/where-nobool", "float[1,4] c, float[1,4] x", "y = Where(c, x, x)", outputs="float[1,4] y")
add("fit/and-float", "float[1,4] x", "y = And(x, x)", outputs="bool[1,4] y")
add("fit/not-int", "int32[1,4] x", "y = Not(x)", outputs="bool[1,4] y")
add("fit/relu-bool", "bool[1,4] x", "y = Relu(x)", outputs="bool[1,4] y")
add("fit/softmax-int", "int32[1,4] x", "y = Softmax(x)", outputs="int32[1,4] y")
add("fit/sigmoid-int64", "int64[1,4] x", "y = Sigmoid(x)", outputs="int64[1,4] y")
add("fit/exp-bool", "bool[1,4] x", "y = Exp(x)", outputs="bool[1,4] y")
add("fit/sqrt-int", "int32[1,4] x", "y = Sqrt(x)", outputs="int32[1,4] y")
add("fit/add-bool", "bool[1,4] x", "y = Add(x, x)", outputs="bool[1,4] y")
add("fit/mul-string", "string[1,4] x", "y = Mul(x, x)", outputs="string[1,4] y")
add("fit/conv-int32", "int32[1,4,8,8] x, int32[4,4,1,1] w", "y = Conv(x, w)", outputs="int32[1,4,8,8] y")
add("fit/topk-0", "float[1,80] x", "y, i = TopK(x, k)", weights="int64[1] k = {0}", outputs="float[1,0] y")
add("fit/topk-negative", "float[1,80] x", "y, i = TopK(x, k)", weights="int64[1] k = {-1}", outputs="float[1,n] y")
add("fit/topk-axis0-4000", "float[4000,2] x", "y, i = TopK<axis=0>(x, k)", weights="int64[1] k = {4000}")
add("fit/cast-bad", ROW, "y = Cast<to=99>(x)", outputs="float[1,4] y")
add("fit/reducemean-axis", ROW, "y = ReduceMean<axes=[5]>(x)", opset=17, outputs="float[1,4] y")
add("fit/onehot", "int64[3] x", "y = OneHot(x, d, v)", weights="int64[1] d = {5}, float[2] v = {0, 1}")
add("fit/depth-bad", IMAGE, "y = DepthToSpace<blocksize=3>(x)", outputs="float[1,4,8,8] y")
add(
    "fit/groupnorm-bad",
    IMAGE,
    "y = GroupNormalization<num_groups=3>(x, w, b)",
    opset=21,
    outputs="float[1,4,8,8] y",
    weights=floats("w", 4) + ", " + floats("b", 4),
)
add("fit/lstm-bad", "float[5,1,3] x", "y = LSTM<hidden_size=5>(x, w, r)", weights=LSTM, outputs="float[5,1,1,5] y")
add(
    "fit/loop-dynamic",
    ROW,
    "y = Loop<body = b (int64 i, bool c, float[1,4] s) => (bool k, float[1,4] t) { k = Identity(c) t = Concat<axis=0>(s, s) }>(n, c, x)",
    weights="int64 n = {3}, bool c = {1}",
    outputs="float[a,4] y",
)
add(
    "fit/if-type",
    "bool c, float[1,4] x",
    "y = If<then_branch = a () => (float[1,4] b) { b = Relu(x) }, else_branch = e () => (int64[1,4] d) { d = Cast<to=7>(x) }>(c)",
    outputs="float[1,4] y",
)
add(
    "fit/if-shape",
    "bool c, float[1,4] x",
    "y = If<then_branch = a () => (float[1,4] b) { b = Relu(x) }, else_branch = e () => (float[2,4] d) { d = Concat<axis=0>(x, x) }>(c)",
    outputs="float[n,4] y",
)

# Every operator in every element type that ONNX allows it: `kinds/OPERATOR-TYPE`.
TYPES = "float16 bfloat16 double int8 uint8 int32 int64 bool"
BODIES = {
    **dict.fromkeys(
        (
            "Abs Acos Atan Ceil Celu Cos Elu Erf Exp Floor HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log "
            "Neg Not Reciprocal Relu Round Selu Shape Shrink Sigmoid Sign Sin Size Softmax LogSoftmax Hardmax Softplus "
            "Softsign Sqrt Tanh ThresholdedRelu Mish Flatten Transpose Trilu ArgMax ArgMin ReduceL1 ReduceL2 "
            "ReduceLogSum ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Squeeze EyeLike "
            "LpNormalization NonZero Dropout Clip Gelu Swish Unique"
        ).split(),
        "y = {0}(x)",
    ),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), "y = {0}(x4)"),
    **dict.fromkeys(
        (
            "Add Sub Mul Div Pow Max Min Mean Sum Equal Less LessOrEqual Greater GreaterOrEqual MatMul Gemm PRelu "
            "And Or Xor BitwiseAnd CastLike"
        ).split(),
        "y = {0}(x, x)",
    ),
    "Mod": "y = Mod<fmod={1}>(x, x)",
    "Concat": "y = Concat<axis=0>(x, x)",
    "Where": "y = Where(c, x, x)",
    "Gather": "y = Gather(x, one)",
    "GatherElements": "y = GatherElements(x, i)",
    "GatherND": "y = GatherND(x, i)",
    "ScatterElements": "y = ScatterElements(x, i, x)",
    "ScatterND": "y = ScatterND(x, n, x)",
    "Expand": "y = Expand(x, big)",
    "Tile": "y = Tile(x, big)",
    "Reshape": "y = Reshape(x, flat)",
    "Unsqueeze": "y = Unsqueeze(x, one)",
    "Slice": "y = Slice(x, zero, one, zero)",
    "Split": "y, z = Split<axis=0>(x)",
    "CumSum": "y = CumSum(x, zero)",
    "TopK": "y, z = TopK(x, one)",
    "Pad": "y = Pad(x, pads)",
    "OneHot": "y = OneHot(i, depth, x1)",
    "ReverseSequence": "y = ReverseSequence(x, big)",
    "MaxPool": "y = MaxPool<kernel_shape=[2]>(x3)",
    "AveragePool": "y = AveragePool<kernel_shape=[2]>(x3)",
    "Resize": "y = Resize(x, , scales)",
    "DepthToSpace": "y = DepthToSpace<blocksize=1>(x4)",
    "LayerNormalization": "y = LayerNormalization(x, x1)",
    "InstanceNormalization": "y = InstanceNormalization(x3, x1, x1)",
    "Conv": "y = Conv(x3, x3)",
    "ConvTranspose": "y = ConvTranspose(x4, x4)",
    "Einsum": 'y = Einsum<equation="ij,jk->ik">(x, x)',
    "GridSample": "y = GridSample(x4, g)",
    "Cast": "y = Cast<to=1>(x)",
}
EXTRA = {"x1": "2", "x3": "1,2,2", "x4": "1,1,2,2"}
CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[2,2] i = {0, 0, 0, 0}, int64[2,1] n = {0, 1}, "
    "int64[2] big = {2, 2}, int64[1] flat = {-1}, int64[4] pads = {0, 0, 1, 1}, int64 depth = {3}, "
    "float[2] scales = {2, 2}"
)


def _kinds(operator: str, body: str) -> None:
    for kind in TYPES.split():
        opset = {"Gelu": 20, "Swish": 24}.get(operator, 22 if kind == "bfloat16" else 20)
        text = body.format(operator, int(kind in ("float16", "double", "bfloat16")))
        inside = text.split("(", 1)[1]
        inputs = [f"{kind}[{EXTRA[name]}] {name}" for name in EXTRA if re.search(rf"\b{name}\b", inside)]
        inputs += [f"{kind}[2,2] x"] * bool(re.search(r"\bx\b", inside)) + ["bool[2,2] c"] * ("(c," in text)
        inputs += [f"{'float' if kind == 'double' else kind}[1,2,2,2] g"] * (", g)" in text)
        used = [
            one.strip() + "}"
            for one in CONSTANTS.split("},")
            if re.search(rf"\b{one.split(' = ')[0].split()[-1]}\b", inside)
        ]
        try:
            model = graph(", ".join(inputs), text, weights=", ".join(used), opset=opset)
            onnx.checker.check_model(model)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
            continue  # a type that ONNX itself does not allow
        if model.graph.output[0].type.tensor_type.elem_type:
            CASES[f"kinds/{operator}-{kind}"] = model


for operator, body in BODIES.items():
    _kinds(operator, body)
