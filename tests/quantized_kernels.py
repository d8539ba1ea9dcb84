"""Small graphs, one for each form in which INT8 graphs use Q/DQ: which of them does a backend compute wrongly?

A backend that departs on a whole graph departs on one of these, or on a pair of neighbors that the whole graph shows
(`edgedetr verify --localize`). Each graph reads `images` [1, C, 16, 16] and gives `y`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

CHANNELS, SIDE = 16, 16
SCALE = np.float32(4 / 127)  # of inputs that are mostly between -4 and 4
FLOOR_DB = 25.0  # a value that rounds to the neighboring level leaves about 40, a wrong scale less than 10

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
CONSTANTS: dict[str, np.ndarray] = {
    "s": np.asarray(SCALE),
    "s2": np.asarray(SCALE / 7),
    "half_s": np.asarray(SCALE, np.float16),
    "one": np.asarray(np.float32(1)),
    "out_s": np.asarray(np.float32(0.05)),
    "i8": np.asarray(np.int8(0)),
    "u8": np.asarray(np.uint8(0)),
    "mid": np.asarray(np.uint8(128)),
    "w": WEIGHT,
    "w_s": RNG.uniform(0.5e-3, 2e-3, CHANNELS).astype(np.float32),
    "half_w_s": RNG.uniform(0.5e-3, 2e-3, CHANNELS).astype(np.float16),
    "w_z": np.zeros(CHANNELS, np.int8),
    "point": WEIGHT[:, :, :1, :1],
    "wide": np.concatenate([WEIGHT[:, :, :1, :1]] * 2, axis=1),
    "m": WEIGHT[:, :, 0, 0],
    "stem": WEIGHT[:, :3],
    "b": RNG.integers(-20000, 20000, CHANNELS).astype(np.int32),
    "b_z": np.zeros(CHANNELS, np.int32),
    "float_b": RNG.standard_normal(CHANNELS).astype(np.float32),
    "rows": np.array([SIDE * SIDE, CHANNELS]),
    "twice": np.float32([1, 1, 2, 2]),
    "ln": np.ones(CHANNELS, np.float32),
    "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
}
CONSTANTS["b_s"] = (CONSTANTS["w_s"] * SCALE).astype(np.float32)

IN8 = ("QuantizeLinear images s i8 -> q", "DequantizeLinear q s i8 -> d")
IN_MID = ("QuantizeLinear images s mid -> q", "DequantizeLinear q s mid -> d")
OUT_MID = ("QuantizeLinear c out_s mid -> cq", "DequantizeLinear cq out_s mid -> y")
WEIGHTS = "DequantizeLinear w w_s w_z -> wd | axis=0"
BIAS = "DequantizeLinear b b_s b_z -> bd | axis=0"
CONV = "| pads=1,1,1,1"
ROWS = ("Transpose images -> t | perm=0,2,3,1", "Reshape t rows -> r")
WINDOW = "| kernel_shape=3,3 strides=2,2"
AROUND = f"{WINDOW} pads=1,1,1,1 count_include_pad=1"
PRODUCT = "DequantizeLinear m w_s w_z -> md | axis=1"

GRAPHS: dict[str, tuple[str, ...]] = {
    "pair, int8": ("QuantizeLinear images s i8 -> q", "DequantizeLinear q s i8 -> y"),
    "pair, uint8 with zero point 128": ("QuantizeLinear images s mid -> q", "DequantizeLinear q s mid -> y"),
    "pair, uint8 with zero point 0, behind Relu": (
        "Relu images -> a",
        "QuantizeLinear a s u8 -> q",
        "DequantizeLinear q s u8 -> y",
    ),
    "pair with an FP16 scale": (
        "Cast images -> h | to=10",
        "QuantizeLinear h half_s i8 -> q",
        "DequantizeLinear q half_s i8 -> d",
        "Cast d -> y | to=1",
    ),
    "Conv, per channel": (*IN8, WEIGHTS, f"Conv d wd -> y {CONV}"),
    "Conv, per channel, image of 0 to 255": (
        "QuantizeLinear images one u8 -> q",
        "DequantizeLinear q one u8 -> d",
        "DequantizeLinear stem w_s w_z -> wd | axis=0",
        f"Conv d wd -> y {CONV}",
    ),
    "Conv, FP16 beside Q/DQ": (
        "Cast images -> h | to=10",
        "QuantizeLinear h half_s i8 -> q",
        "DequantizeLinear q half_s i8 -> d",
        "DequantizeLinear w half_w_s w_z -> wd | axis=0",
        f"Conv d wd -> c {CONV}",
        "Cast c -> y | to=1",
    ),
    "Conv, int32 bias": (*IN_MID, WEIGHTS, BIAS, f"Conv d wd bd -> y {CONV}"),
    "Conv, output quantized": (*IN_MID, WEIGHTS, BIAS, f"Conv d wd bd -> c {CONV}", *OUT_MID),
    "Conv, Relu, output quantized": (
        *IN_MID,
        WEIGHTS,
        BIAS,
        f"Conv d wd bd -> a {CONV}",
        "Relu a -> c",
        "QuantizeLinear c out_s u8 -> cq",
        "DequantizeLinear cq out_s u8 -> y",
    ),
    "Conv, SiLU, output quantized": (
        *IN_MID,
        WEIGHTS,
        f"Conv d wd -> a {CONV}",
        "Sigmoid a -> e",
        "Mul a e -> c",
        *OUT_MID,
    ),
    "two Convs read one pair": (*IN8, WEIGHTS, f"Conv d wd -> a {CONV}", f"Conv d wd -> e {CONV}", "Add a e -> y"),
    "sum of two pairs, Relu": (
        *IN8,
        WEIGHTS,
        f"Conv d wd -> a {CONV}",
        "QuantizeLinear a out_s i8 -> aq",
        "DequantizeLinear aq out_s i8 -> ad",
        "Add ad d -> e",
        "Relu e -> y",
    ),
    "MaxPool between pairs": (
        *IN8,
        "MaxPool d -> c | kernel_shape=2,2 strides=2,2",
        "QuantizeLinear c s i8 -> cq",
        "DequantizeLinear cq s i8 -> y",
    ),
    "AveragePool that counts its zeros, int8": (*IN8, f"AveragePool d -> y {AROUND}"),
    "AveragePool that counts its zeros, uint8": (*IN_MID, f"AveragePool d -> y {AROUND}"),
    "AveragePool that leaves its padding out, uint8": (*IN_MID, f"AveragePool d -> y {WINDOW} pads=1,1,1,1"),
    "Pad, AveragePool, uint8": (*IN_MID, "Pad d around -> c", f"AveragePool c -> y {WINDOW}"),
    "Pad, pair, AveragePool, uint8": (
        *IN_MID,
        "Pad d around -> c",
        "QuantizeLinear c s mid -> cq",
        "DequantizeLinear cq s mid -> e",
        f"AveragePool e -> y {WINDOW}",
    ),
    "Pad, MaxPool, uint8": (*IN_MID, "Pad d around -> c", f"MaxPool c -> y {WINDOW}"),
    "Pad, Conv, uint8": (*IN_MID, WEIGHTS, "Pad d around -> c", "Conv c wd -> y"),
    "Resize between pairs": (
        *IN8,
        "Resize d  twice -> c",
        "QuantizeLinear c s i8 -> cq",
        "DequantizeLinear cq s i8 -> y",
    ),
    "Concat of unequal ranges, one scale, Conv": (
        "Mul images s2 -> small",
        "Concat images small -> c | axis=1",
        "QuantizeLinear c s i8 -> q",
        "DequantizeLinear q s i8 -> d",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv d wd -> y",
    ),
    "Resize and Conv, Concat, pair, Conv": (
        *IN8,
        "DequantizeLinear point w_s w_z -> pd | axis=0",
        "MaxPool d -> half | kernel_shape=2,2 strides=2,2",
        "Resize half  twice -> up",
        "Conv d pd -> a",
        "Concat up a -> c | axis=1",
        "QuantizeLinear c s i8 -> q2",
        "DequantizeLinear q2 s i8 -> d2",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv d2 wd -> y",
    ),
    "Concat, pair, MaxPool, Conv": (
        "Concat images images -> c | axis=1",
        "QuantizeLinear c s i8 -> q",
        "DequantizeLinear q s i8 -> d",
        "MaxPool d -> e | kernel_shape=2,2",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv e wd -> y",
    ),
    "Qs of one scale, Concat of integers, DQ, Conv": (
        "Mul images s2 -> small",
        "QuantizeLinear images s i8 -> q",
        "QuantizeLinear small s i8 -> q2",
        "Concat q q2 -> c | axis=1",
        "DequantizeLinear c s i8 -> d",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv d wd -> y",
    ),
    "pairs, Concat, Conv": (
        *IN8,
        "Concat d d -> c | axis=1",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv c wd -> y",
    ),
    "Concat, pair, Conv, uint8": (
        "Concat images images -> c | axis=1",
        "QuantizeLinear c s mid -> q",
        "DequantizeLinear q s mid -> d",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv d wd -> y",
    ),
    "Concat, pair, MatMul": (
        *ROWS,
        "Concat r r -> c | axis=0",
        "QuantizeLinear c s i8 -> q",
        "DequantizeLinear q s i8 -> d",
        PRODUCT,
        "MatMul d md -> y",
    ),
    "MatMul, per channel, bias": (
        *ROWS,
        "QuantizeLinear r s i8 -> q",
        "DequantizeLinear q s i8 -> d",
        PRODUCT,
        "MatMul d md -> p",
        "Add p float_b -> y",
    ),
    "Gemm, int32 bias": (
        *ROWS,
        "QuantizeLinear r s mid -> q",
        "DequantizeLinear q s mid -> d",
        PRODUCT,
        BIAS,
        "Gemm d md bd -> y",
    ),
    "MatMul of two activations": (
        *ROWS,
        "QuantizeLinear r s i8 -> q",
        "DequantizeLinear q s i8 -> d",
        "Transpose d -> dt | perm=1,0",
        "MatMul d dt -> y",
    ),
    "Softmax, quantized": (*ROWS, "Softmax r -> a", "QuantizeLinear a s2 u8 -> q", "DequantizeLinear q s2 u8 -> y"),
    "LayerNormalization between pairs": (
        *ROWS,
        "QuantizeLinear r s i8 -> q",
        "DequantizeLinear q s i8 -> d",
        "LayerNormalization d ln -> c",
        "QuantizeLinear c s i8 -> cq",
        "DequantizeLinear cq s i8 -> y",
    ),
    "QLinearConv": (
        "QuantizeLinear images s mid -> q",
        f"QLinearConv q s mid w w_s w_z out_s mid b -> cq {CONV}",
        "DequantizeLinear cq out_s mid -> y",
    ),
    "MatMulInteger": (
        *ROWS,
        "QuantizeLinear r s mid -> q",
        "MatMulInteger q m mid -> n",
        "Cast n -> f | to=1",
        "Mul f b_s -> y",
    ),
}


def build(lines: Sequence[str]) -> ModelProto:
    """A graph of lines like "Conv d wd -> c | pads=1,1,1,1"; two spaces in a row leave an input out."""
    nodes = []
    for line in lines:
        head, _, options = line.partition("|")
        inputs, _, output = head.partition(" -> ")
        operator, *names = inputs.split(" ")
        values = {key: [int(v) for v in text.split(",")] for key, text in (o.split("=") for o in options.split())}
        single = ("axis", "to", "count_include_pad", "ceil_mode")
        attributes = {key: value[0] if key in single else value for key, value in values.items()}
        nodes.append(helper.make_node(operator, names, [output.strip()], line, **attributes))
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in used]
    channels = 3 if "stem" in used else CHANNELS
    graph = helper.make_graph(
        nodes,
        "kernel",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, channels, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def images_for(model: ModelProto) -> np.ndarray:
    """Input of a graph: pixels for one that reads three channels, else values around 0."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    if shape[1] == 3:
        return rng.uniform(0, 255, shape).astype(np.float32)
    return rng.standard_normal(shape).astype(np.float32)
