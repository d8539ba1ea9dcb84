"""A graph for whole camera frames that is small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper


def write(path: Path) -> None:
    """frames [1, 24, 40, 3] uint8 -> a box that is the mean color, its score, label 1 where that is above 127."""
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    float_, int_ = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    nodes = [
        make("Cast", ["frames"], ["floats"], to=float_),
        make("ReduceMean", ["floats", "space"], ["mean"], keepdims=0),
        make("Concat", ["mean", "one"], ["flat"], axis=1),
        make("Reshape", ["flat", "box"], ["boxes"]),
        make("ReduceMax", ["mean", "last"], ["scores"], keepdims=1),
        make("Greater", ["scores", "half"], ["bright"]),
        make("Cast", ["bright"], ["labels"], to=int_),
    ]
    constants = {
        "space": np.array([1, 2]),
        "one": np.ones((1, 1), np.float32),
        "box": np.array([1, 1, 4]),
        "last": np.array([1]),
        "half": np.float32(127),
    }
    graph = onnx.helper.make_graph(
        nodes,
        "frames",
        [value("frames", onnx.TensorProto.UINT8, [1, 24, 40, 3])],
        [value("boxes", float_, [1, 1, 4]), value("scores", float_, [1, 1]), value("labels", int_, [1, 1])],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9), str(path))
