"""GridSample written as gathers of rows: the same numbers, in operators that every TensorRT computes rightly."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgedetr.graph.view import GraphView, attribute, text


def gather_samples(model: ModelProto) -> int:
    """Rewrite every bilinear GridSample that pads with zeros and whose sizes are known; how many there were."""
    view, done = GraphView(model), 0
    nodes: list[NodeProto] = []
    for node in view.nodes:
        shapes = [view.shape(name) for name in node.input[:2]]
        if node.op_type == "GridSample" and _plain(node) and all(_known(shape) for shape in shapes):
            written = _Writer(model, node, [int(size or 0) for size in shapes[0] or []],
                              [int(size or 0) for size in shapes[1] or []])
            nodes += written.write()
            done += 1
        else:
            nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return done


def _plain(node: NodeProto) -> bool:
    return text(node, "mode", "bilinear") == "bilinear" and text(node, "padding_mode", "zeros") == "zeros"


def _known(shape: list[int | None] | None) -> bool:
    return shape is not None and len(shape) == 4 and all(size for size in shape)


class _Writer:
    """The nodes that replace one GridSample: values [B, C, H, W], grid [B, h, w, 2] -> [B, C, h, w]."""

    def __init__(self, model: ModelProto, node: NodeProto, values: list[int], grid: list[int]) -> None:
        self.model, self.node, self.nodes = model, node, list[NodeProto]()
        self.batch, self.channels, self.height, self.width = values
        self.out = grid[1:3]

    def write(self) -> list[NodeProto]:
        batch, channels, points = self.batch, self.channels, self.out[0] * self.out[1]
        rows = self._do("Reshape", self._do("Transpose", self.node.input[0], perm=[0, 2, 3, 1]),
                        self._constant(np.array([batch * self.height * self.width, channels])))
        grid = self._do("Reshape", self.node.input[1], self._constant(np.array([batch, points, 2])))
        x = self._around(grid, 0, self.width)
        y = self._around(grid, 1, self.height)
        first = self._constant(np.arange(batch)[:, None] * self.height * self.width)
        parts = []
        for row, down in zip(y[:2], y[2:]):
            for column, across in zip(x[:2], x[2:]):
                cell = self._do("Add", self._do("Mul", row, self._number(self.width)), column)
                index = self._do("Add", self._do("Cast", cell, to=7), first)        # int64
                weight = self._do("Unsqueeze", self._do("Mul", down, across), self._constant(np.array([2])))
                parts.append(self._do("Mul", self._do("Gather", rows, index, axis=0), weight))
        total = parts[0]
        for part in parts[1:]:
            total = self._do("Add", total, part)
        turned = self._do("Transpose", total, perm=[0, 2, 1])
        self._do("Reshape", turned, self._constant(np.array([batch, channels, *self.out])), output=self.node.output[0])
        return self.nodes

    def _around(self, grid: str, axis: int, cells: int) -> tuple[str, str, str, str]:
        """The two cells about each place along an axis, [B, P], and their weights; a cell outside the map weighs 0.

        Places are held within one cell outside the map, where both cells coincide: (high - low) is 0 or 1.
        """
        aligned = attribute(self.node, "align_corners", 0)
        half = (cells - 1) / 2
        scaled = self._do("Mul", self._do("Gather", grid, self._constant(np.array(axis)), axis=2),
                          self._number(half if aligned else cells / 2))
        place = self._clip(self._do("Add", scaled, self._number(half)), -1, cells)
        below = self._do("Floor", place)
        low = self._clip(below, 0, cells - 1)
        high = self._do("Min", self._do("Add", below, self._number(1)), self._number(cells - 1))
        near = self._do("Sub", place, low)
        return (low, high, self._do("Sub", self._number(1), self._do("Abs", near)),
                self._do("Mul", near, self._do("Sub", high, low)))

    def _clip(self, name: str, low: float, high: float) -> str:
        return self._do("Clip", name, self._number(low), self._number(high))

    def _do(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{self.node.name}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output or f"{name}_output"], name, **attributes))
        return self.nodes[-1].output[0]

    def _number(self, value: float) -> str:
        return self._constant(np.float32(value))

    def _constant(self, value: np.ndarray | np.float32) -> str:
        name = f"{self.node.name}/constant_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name
