"""Make the self-test models of `edgedetr selftest`: small graphs of kinds that versions of TensorRT computed wrongly.

They are stored with inputs and outputs in runtime/tensorrt/selftest_models, because a device has no onnx package.
After a change here run `python -m edgedetr.onnx_graph.selftest_models`; a test compares the stored files with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

from edgedetr.onnx_graph.opset import IR_VERSION, OPSET
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.runtime.tensorrt.selftest import FOLDER

QUERIES, POINTS, CHANNELS, SIDE = 48, 4, 16, 20
FEED = "x"


def grid_sample(rng: np.random.Generator) -> tuple[ModelProto, np.ndarray]:
    """Small deformable attention: locations and weights are projections of the queries; GridSample; weighted sum.

    The batch holds one row twice: TensorRT 10.14 and 11.1 gave different answers to equal rows (TensorRT issue 4813).
    """
    row = rng.standard_normal((1, QUERIES + SIDE * SIDE, CHANNELS)).astype(np.float32)
    constants = {
        "queries_end": np.array([QUERIES]),
        "zero": np.array([0]),
        "end": np.array([QUERIES + SIDE * SIDE]),
        "tokens": np.array([1]),
        "map_shape": np.array([2, CHANNELS, SIDE, SIDE]),
        "place_weight": _normal(rng, CHANNELS, 2 * POINTS),
        "grid_shape": np.array([2, QUERIES, POINTS, 2]),
        "score_weight": _normal(rng, CHANNELS, POINTS),
        "score_shape": np.array([2, 1, QUERIES, POINTS]),
        "value_weight": _normal(rng, CHANNELS, CHANNELS),
        "out_weight": _normal(rng, CHANNELS, CHANNELS),
        "last": np.array([3]),
    }
    nodes = [
        _node("Slice", [FEED, "zero", "queries_end", "tokens"], "queries"),
        _node("Slice", [FEED, "queries_end", "end", "tokens"], "memory"),
        _node("MatMul", ["memory", "value_weight"], "values"),
        _node("Transpose", ["values"], "channels_first", perm=[0, 2, 1]),
        _node("Reshape", ["channels_first", "map_shape"], "map"),
        _node("MatMul", ["queries", "place_weight"], "places"),
        _node("Tanh", ["places"], "inside"),
        _node("Reshape", ["inside", "grid_shape"], "grid"),
        _node("GridSample", ["map", "grid"], "sampled", mode="bilinear", padding_mode="zeros", align_corners=0),
        _node("MatMul", ["queries", "score_weight"], "scores"),
        _node("Softmax", ["scores"], "weights", axis=-1),
        _node("Reshape", ["weights", "score_shape"], "spread"),
        _node("Mul", ["sampled", "spread"], "weighted"),
        _node("ReduceSum", ["weighted", "last"], "summed", keepdims=0),
        _node("Transpose", ["summed"], "tokens_first", perm=[0, 2, 1]),
        _node("MatMul", ["tokens_first", "out_weight"], "mixed"),
        _node("Add", ["mixed", "queries"], "y"),
    ]
    return _model("grid_sample", nodes, constants, row.shape[1:], 2, (QUERIES, CHANNELS)), np.repeat(row, 2, axis=0)


def layer_norm(rng: np.random.Generator) -> tuple[ModelProto, np.ndarray]:
    """LayerNormalization in FP16 of values whose squares do not fit into FP16: the sums must be kept in float32."""
    x = (3000 + 900 * rng.standard_normal((2, 64, 128))).astype(np.float32)
    constants = {
        "scale": rng.uniform(0.5, 1.5, 128).astype(np.float16),
        "bias": _normal(rng, 128).astype(np.float16),
        "weight": _normal(rng, 128, 32).astype(np.float16),
    }
    nodes = [
        _node("Cast", [FEED], "half", to=TensorProto.FLOAT16),
        _node("LayerNormalization", ["half", "scale", "bias"], "normed", axis=-1, epsilon=1e-5),
        _node("MatMul", ["normed", "weight"], "mixed"),
        _node("Cast", ["mixed"], "y", to=TensorProto.FLOAT),
    ]
    return _model("layer_norm", nodes, constants, x.shape[1:], 2, (64, 32)), x


def concat(rng: np.random.Generator) -> tuple[ModelProto, np.ndarray]:
    """Two INT8 convolutions of different ranges, concatenated and quantized once: their scales must not be mixed up."""
    x = rng.standard_normal((1, 32, 16, 16)).astype(np.float32)
    constants: dict[str, np.ndarray] = {"zero": np.int8(0), "zeros": np.zeros(32, np.int8)}
    nodes = [_node("Cast", [FEED], "half", to=TensorProto.FLOAT16), *_qdq("half", 0.03, constants)]
    for branch, (gain, scale) in {"a": (1.0, 0.03), "b": (6.0, 0.17)}.items():
        nodes += _conv(f"{branch}", "half_dq", gain * _normal(rng, 32, 32, 3, 3), constants)
        nodes += [_node("Relu", [f"{branch}_conv"], f"{branch}_relu"), *_qdq(f"{branch}_relu", scale, constants)]
    nodes += [_node("Concat", ["a_relu_dq", "b_relu_dq"], "joined", axis=1), *_qdq("joined", 0.17, constants)]
    nodes += _conv("c", "joined_dq", _normal(rng, 32, 64, 1, 1), constants)
    nodes.append(_node("Cast", ["c_conv"], "y", to=TensorProto.FLOAT))
    return _model("concat", nodes, constants, x.shape[1:], 1, (32, 16, 16)), x


SELFTEST_MODELS: dict[str, Callable[[np.random.Generator], tuple[ModelProto, np.ndarray]]] = {
    "grid_sample": grid_sample,
    "layer_norm": layer_norm,
    "concat": concat,
}


def make(name: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """ONNX file, input, and output by ONNX Runtime without optimizations, of one self-test model; always the same."""
    model, x = SELFTEST_MODELS[name](np.random.default_rng(len(name)))
    checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    return data, x, GraphSession(model, ["y"], threads=1).run({FEED: x})["y"]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SELFTEST_MODELS:
        data, x, y = make(name)
        (folder / f"{name}.onnx").write_bytes(data)
        with open(folder / f"{name}.npz", "wb") as stream:
            np.savez_compressed(stream, x=x, y=y)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights that keep the variance: [in, ..., out] or [out, in, k, k]."""
    fan = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
    return (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def _qdq(name: str, scale: float, constants: dict[str, np.ndarray]) -> list[NodeProto]:
    constants[f"{name}_scale"] = np.float16(scale)
    return [
        _node("QuantizeLinear", [name, f"{name}_scale", "zero"], f"{name}_q"),
        _node("DequantizeLinear", [f"{name}_q", f"{name}_scale", "zero"], f"{name}_dq"),
    ]


def _conv(name: str, source: str, weight: np.ndarray, constants: dict[str, np.ndarray]) -> list[NodeProto]:
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / 127).astype(np.float16)
    constants.update({f"{name}_weight": weight.astype(np.float16), f"{name}_weight_scale": scale})
    words = [f"{name}_weight_scale", "zeros"]
    return [
        _node("QuantizeLinear", [f"{name}_weight", *words], f"{name}_weight_q", axis=0),
        _node("DequantizeLinear", [f"{name}_weight_q", *words], f"{name}_weight_dq", axis=0),
        _node("Conv", [source, f"{name}_weight_dq"], f"{name}_conv", pads=[weight.shape[2] // 2] * 4),
    ]


def _model(
    name: str,
    nodes: list[NodeProto],
    constants: dict[str, np.ndarray],
    feed: tuple[int, ...],
    batch: int,
    output: tuple[int, ...],
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(FEED, TensorProto.FLOAT, [batch, *feed])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, *output])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


if __name__ == "__main__":
    write(FOLDER)
