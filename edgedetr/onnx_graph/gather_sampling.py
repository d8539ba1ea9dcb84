"""GridSample written as gathers of rows: the same numbers, in operators that every TensorRT computes rightly."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex, int_attribute, string_attribute
from edgedetr.onnx_graph.settle_sizes import shapes_by_running


def gather_samples(model: ModelProto) -> int:
    """Rewrite every GridSample; how many there were. ExportError that names the first which cannot be rewritten.

    The graph is one of a fixed size: sizes that cannot be inferred are read off a run.
    """
    graph = GraphIndex(model)
    samples = [node for node in graph.nodes if node.op_type == "GridSample"]
    unknown = [name for node in samples for name in node.input[:2] if not _known(graph.shape(name))]
    seen = shapes_by_running(model, unknown)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "GridSample":
            nodes.append(node)
            continue
        shapes: list[Any] = [seen.get(name) or graph.shape(name) for name in node.input[:2]]
        fault = _fault(node, shapes)
        if fault:
            raise ExportError(
                f"GridSample {node.name} {fault}, and cannot be written as gathers; keep the operator "
                "with --sampling grid_sample (TensorRT 10.14 to 11.1 get it wrong), or export the model "
                "with bilinear sampling of 2-D maps"
            )
        nodes += _Writer(model, node, *([int(size or 0) for size in shape or []] for shape in shapes)).write()
    if samples:
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)
    return len(samples)


def _fault(node: NodeProto, shapes: list[list[int | None] | None]) -> str:
    """What hinders the rewriting, or an empty string."""
    mode, padding = string_attribute(node, "mode", "bilinear"), string_attribute(node, "padding_mode", "zeros")
    if mode not in ("bilinear", "linear", "nearest"):
        return f"has mode {mode!r}"
    if padding not in ("zeros", "border"):
        return f"has padding_mode {padding!r}"
    if not all(_known(shape) for shape in shapes):
        return "takes " + " and ".join(
            "a tensor of unknown rank"
            if shape is None
            else f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
            for shape in shapes
        )
    return ""


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
        rows = self._do(
            "Reshape",
            self._do("Transpose", self.node.input[0], perm=[0, 2, 3, 1]),
            self._constant(np.array([batch * self.height * self.width, channels])),
        )
        grid = self._do("Reshape", self.node.input[1], self._constant(np.array([batch, points, 2])))
        x, y = self._cells(grid, 0, self.width), self._cells(grid, 1, self.height)
        first = self._constant(np.arange(batch)[:, None] * self.height * self.width)
        parts = []
        for row, down in y:
            for column, across in x:
                cell = self._do("Add", self._do("Mul", row, self._number(self.width)), column)
                index = self._do("Add", self._do("Cast", cell, to=7), first)  # int64
                weight = self._do("Unsqueeze", self._do("Mul", down, across), self._constant(np.array([2])))
                parts.append(self._do("Mul", self._do("Gather", rows, index, axis=0), weight))
        total = parts[0]
        for part in parts[1:]:
            total = self._do("Add", total, part)
        turned = self._do("Transpose", total, perm=[0, 2, 1])
        self._do("Reshape", turned, self._constant(np.array([batch, channels, *self.out])), output=self.node.output[0])
        return self.nodes

    def _cells(self, grid: str, axis: int, cells: int) -> list[tuple[str, str]]:
        """The cells about each place along an axis, [B, P], each with its weight; a cell outside the map weighs 0.

        Places are held within one cell outside the map ("border": within the map), where the two cells of the linear
        interpolation coincide: (high - low) is 0 or 1.
        """
        half = (cells - 1) / 2
        scaled = self._do(
            "Mul",
            self._do("Gather", grid, self._constant(np.array(axis)), axis=2),
            self._number(half if int_attribute(self.node, "align_corners", 0) else cells / 2),
        )
        outside = 0 if string_attribute(self.node, "padding_mode", "zeros") == "border" else 1
        place = self._clip(self._do("Add", scaled, self._number(half)), -outside, cells - 1 + outside)
        if string_attribute(self.node, "mode", "bilinear") == "nearest":
            nearest = self._do("Round", place)  # halves to even, as GridSample does
            inside = self._clip(nearest, 0, cells - 1)
            beyond = self._do("Abs", self._do("Sub", nearest, inside))
            return [(inside, self._do("Sub", self._number(1), beyond))]
        below = self._do("Floor", place)
        low = self._clip(below, 0, cells - 1)
        high = self._do("Min", self._do("Add", below, self._number(1)), self._number(cells - 1))
        near = self._do("Sub", place, low)
        return [
            (low, self._do("Sub", self._number(1), self._do("Abs", near))),
            (high, self._do("Mul", near, self._do("Sub", high, low))),
        ]

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
