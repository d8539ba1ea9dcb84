"""A tiny network, what runs it in ONNX Runtime, and the arithmetic of its INT8 form in plain numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.quantization.target import TENSORRT

CHANNELS = 16
SIGNED = replace(TENSORRT, fp16=False)  # the same pairs and integers, with float32 scales
# Every normal FP16 number above zero, in order: what a step may be.
STEPS = np.arange(1 << 10, 31 << 10, dtype=np.uint16).view(np.float16).astype(np.float64)


def network(rng: np.random.Generator, residual: bool) -> ModelProto:
    """images -> Conv, Relu -> Conv (+ skip), Relu -> Conv -> logits; the same as tokens @ matrix + bias -> boxes."""
    constants = {
        "w0": rng.normal(0, 0.3, (CHANNELS, 3, 3, 3)),
        "b0": rng.normal(0, 0.2, CHANNELS),
        "w1": rng.normal(0, 0.1, (CHANNELS, CHANNELS, 3, 3)),
        "b1": rng.normal(0, 0.2, CHANNELS),
        "w2": rng.normal(0, 0.2, (CHANNELS, CHANNELS, 1, 1)),
        "b2": rng.normal(0, 0.2, CHANNELS),
        "m": rng.normal(0, 0.2, (CHANNELS, 20)),
        "mb": rng.normal(0, 0.2, 20),
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    initializers += [numpy_helper.from_array(np.array([1, 64, CHANNELS]), "shape")]
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["images", "w0", "b0"], ["c0"], "body/conv0", **pads),
        helper.make_node("Relu", ["c0"], ["r0"], "body/relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], "body/conv1", **pads),
        *([helper.make_node("Add", ["c1", "r0"], ["s1"], "body/sum")] if residual else []),
        helper.make_node("Relu", ["s1" if residual else "c1"], ["r1"], "body/relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["logits"], "head/conv2"),
        helper.make_node("Reshape", ["r1", "shape"], ["tokens"], "head/reshape"),
        helper.make_node("MatMul", ["tokens", "m"], ["product"], "head/matmul"),
        helper.make_node("Add", ["product", "mb"], ["boxes"], "head/add"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CHANNELS, 8, 8]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 64, 20]),
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def run(
    model: ModelProto, images: np.ndarray, names: list[str] | None = None, optimize: bool = False
) -> list[np.ndarray]:
    exposed = ModelProto()
    exposed.CopyFrom(model)
    present = [item.name for item in exposed.graph.output]
    wanted = [name for name in names or [] if name not in present]
    exposed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {"images": images})


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, pad: int) -> np.ndarray:
    """[C, H, W] by a loop over kernel positions, float64."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    height, width = x.shape[1] - weight.shape[2] + 1, x.shape[2] - weight.shape[3] + 1
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            out += np.einsum("oc,chw->ohw", weight[:, :, i, j], x[:, i : i + height, j : j + width])
    return out


def fp16_scale(step: np.ndarray | float) -> np.ndarray:
    """The smallest normal FP16 number that is at least this."""
    return STEPS[np.searchsorted(STEPS, np.float32(step))]


def fake(x: np.ndarray, amax: float) -> np.ndarray:
    """Nearest level of the TensorRT grid, half to even."""
    step = fp16_scale(amax / 127)
    return np.clip(np.rint((x / step).astype(np.float32)), -128, 127).astype(np.float64) * step


def fake_weight(weight: np.ndarray) -> np.ndarray:
    """Per output channel (axis 0)."""
    step = fp16_scale(np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127)
    return np.clip(np.rint(weight / step), -127, 127) * step
