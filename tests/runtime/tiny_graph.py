"""A detector small enough to work out by hand: fixed boxes, and scores that are linear in the image's mean color."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

BOXES = np.array([[0.25, 0.5, 0.3, 0.6], [0.7, 0.4, 0.4, 0.4], [0.5, 0.5, 1.2, 0.2]], np.float32)  # cx, cy, w, h


def write(
    path: Path,
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    height: int = 32,
    width: int = 48,
    batch: int | str = 1,
    boxes: np.ndarray = BOXES,
    names: tuple[str, str] = ("logits", "boxes"),
) -> None:
    """logits [B, N, K] = mean color [B, 3] / 255 @ weight [3, N * K] + bias [N, K]; boxes [N, 4] for every image."""
    n, k = bias.shape
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0, name="mean"),
        helper.make_node("Div", ["mean", "white"], ["color"], name="color"),
        helper.make_node("MatMul", ["color", "weight"], ["flat"], name="class_head"),
        helper.make_node("Reshape", ["flat", "shape"], ["scores"], name="reshape"),
        helper.make_node("Add", ["scores", "bias"], [names[0]], name="bias"),
        # boxes need the batch axis of the logits: logits summed over K, times 0, plus the boxes
        helper.make_node("ReduceSum", [names[0], "last"], ["sum"], keepdims=1, name="sum"),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"], name="nothing"),
        helper.make_node("Add", ["nothing", "places"], [names[1]], name="places"),
    ]
    constants = {
        "axes": np.array([2, 3]),
        "white": np.float32(255),
        "weight": weight.astype(np.float32),
        "shape": np.array([-1, n, k]),
        "bias": bias.astype(np.float32),
        "last": np.array([2]),
        "zero": np.float32(0),
        "places": boxes.astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, height, width])],
        [
            helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [batch, n, k]),
            helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [batch, n, 4]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    checker.check_model(model)
    save(model, str(path))
