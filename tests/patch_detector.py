"""A detector of one convolution: what it finds depends on where in the image which colors are, and costs nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract

CELLS = 4  # per side, each with one query


def write(path: Path, contract: InputContract, width: int, batch: int | str = 1, seed: int = 0) -> None:
    """images [B, 3, H, W] -> logits [B, 16, width], boxes [B, 16, 4]; a query sees one of 4 x 4 cells."""
    rng = np.random.default_rng(seed)
    cell = contract.height // CELLS, contract.width // CELLS
    area = cell[0] * cell[1] * 3
    # Even over a cell, so that rounding a level up or down at single pixels cancels.
    colors = np.repeat(rng.normal(size=(width + 4, 3, 1, 1)) * 4 / area * 3 / 255, cell[0], axis=2)
    weight = np.repeat(colors, cell[1], axis=3).astype(np.float32)
    constants = {
        "weight": weight,
        "bias": rng.normal(size=width + 4).astype(np.float32),
        "shape": np.array([0, width + 4, CELLS * CELLS]),
        "parts": np.array([width, 4]),
        "spread": rng.normal(size=(1, CELLS * CELLS, width + 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["cells"], strides=cell, name="conv"),
        helper.make_node("Reshape", ["cells", "shape"], ["rows"], name="reshape"),
        helper.make_node("Transpose", ["rows"], ["queries"], perm=[0, 2, 1], name="transpose"),
        helper.make_node("Add", ["queries", "spread"], ["all"], name="spread"),
        helper.make_node("Split", ["all", "parts"], ["logits", "places"], axis=2, name="split"),
        helper.make_node("Sigmoid", ["places"], ["boxes"], name="sigmoid"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "patches",
        [value("images", TensorProto.FLOAT, [batch, 3, contract.height, contract.width])],
        [
            value("logits", TensorProto.FLOAT, [batch, CELLS * CELLS, width]),
            value("boxes", TensorProto.FLOAT, [batch, CELLS * CELLS, 4]),
        ],
        [numpy_helper.from_array(v, name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    checker.check_model(model)
    save(model, str(path))


def bundle(
    folder: Path,
    *,
    contract: InputContract | None = None,
    activation: str = "sigmoid",
    top_k: int = 20,
    classes: int = 3,
    batch: int | str = 1,
    files: tuple[str, ...] = ("model.onnx",),
    seed: int = 0,
) -> Bundle:
    """A bundle with that graph under the named files; ids and names are unlike the indices."""
    contract = contract or InputContract(64, 96)
    known = tuple(ClassInfo(index, 10 - index, f"class; {index}") for index in range(classes))
    made = Bundle.create(folder, Manifest("patches", known, contract, OutputContract(activation, top_k)))
    for name in files:
        with made.add(name, stage="export") as path:
            write(path, contract, classes + (activation == "softmax"), batch, seed)
    return made


def smooth(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """An image of colored areas, [H, W, 3] uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3))
    rows, columns = (np.arange(side) * parts // side for side, parts in zip(size, coarse.shape))
    return coarse[rows][:, columns].astype(np.uint8)
