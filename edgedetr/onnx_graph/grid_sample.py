"""Write each GridSample as gathers of rows: the same numbers, in operators that every TensorRT computes correctly."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_builder import GraphBuilder
from edgedetr.onnx_graph.graph_edit import replace_nodes
from edgedetr.onnx_graph.index import GraphIndex, int_attribute, string_attribute
from edgedetr.onnx_graph.session import shapes_by_running

Shape = list[int | None]


def replace_grid_samples(model: ModelProto) -> int:
    """Rewrite every GridSample in place, and return how many there were.

    The graph has a fixed size: sizes that cannot be inferred are taken from a run.
    Errors: ExportError that names the first GridSample which cannot be rewritten.
    """
    graph = GraphIndex(model)
    samples = [node for node in graph.nodes if node.op_type == "GridSample"]
    if not samples:
        return 0
    unknown = [name for node in samples for name in node.input[:2] if _sizes(graph.shape(name)) is None]
    measured = shapes_by_running(model, unknown)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "GridSample":
            nodes.append(node)
            continue
        shapes: list[Shape | None] = [list(measured[n]) if n in measured else graph.shape(n) for n in node.input[:2]]
        values, grid = (_sizes(shape) for shape in shapes)
        reason = _unsupported(node, shapes)
        if reason or values is None or grid is None:
            raise ExportError(
                f"GridSample {node.name} {reason}, and cannot be written as gathers; keep the operator "
                "with --sampling grid_sample (TensorRT 10.14 to 11.1 get it wrong), or export the model "
                "with bilinear sampling of 2-D maps"
            )
        written = _GatherWriter(node, values, grid)
        nodes += written.write()
        model.graph.initializer.extend(written.builder.constants)
    replace_nodes(model, nodes)
    return len(samples)


def _unsupported(node: NodeProto, shapes: list[Shape | None]) -> str:
    """Why the node cannot be rewritten, or an empty string."""
    mode, padding = string_attribute(node, "mode", "bilinear"), string_attribute(node, "padding_mode", "zeros")
    if mode not in ("bilinear", "linear", "nearest"):
        return f"has mode {mode!r}"
    if padding not in ("zeros", "border"):
        return f"has padding_mode {padding!r}"
    if not all(_sizes(shape) for shape in shapes):
        return "takes " + " and ".join(
            "a tensor of unknown rank"
            if shape is None
            else f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
            for shape in shapes
        )
    return ""


def _sizes(shape: Shape | None) -> list[int] | None:
    """The four sizes of a tensor, or None where one is open or zero or the rank is another."""
    sizes = [size for size in shape or [] if size]
    return sizes if shape is not None and len(sizes) == len(shape) == 4 else None


class _GatherWriter:
    """The nodes that replace one GridSample: values [B, C, H, W], grid [B, h, w, 2] -> [B, C, h, w]."""

    def __init__(self, node: NodeProto, values: list[int], grid: list[int]) -> None:
        self.node, self.builder = node, GraphBuilder(node.name)
        self.batch, self.channels, self.height, self.width = values
        self.out = grid[1:3]

    def write(self) -> list[NodeProto]:
        add, constant = self.builder.add, self.builder.constant
        batch, channels, points = self.batch, self.channels, self.out[0] * self.out[1]
        rows = add(
            "Reshape",
            add("Transpose", self.node.input[0], perm=[0, 2, 3, 1]),
            constant([batch * self.height * self.width, channels]),
        )
        grid = add("Reshape", self.node.input[1], constant([batch, points, 2]))
        x, y = self._cells(grid, 0, self.width), self._cells(grid, 1, self.height)
        first = constant(np.arange(batch)[:, None] * self.height * self.width)
        terms = []
        for row, weight_y in y:
            for column, weight_x in x:
                cell = add("Add", add("Mul", row, self._number(self.width)), column)
                index = add("Add", add("Cast", cell, to=TensorProto.INT64), first)
                weight = add("Unsqueeze", add("Mul", weight_y, weight_x), constant([2]))
                terms.append(add("Mul", add("Gather", rows, index, axis=0), weight))
        total = terms[0]
        for term in terms[1:]:
            total = add("Add", total, term)
        channels_first = add("Transpose", total, perm=[0, 2, 1])
        add("Reshape", channels_first, constant([batch, channels, *self.out]), output=self.node.output[0])
        return self.builder.nodes

    def _cells(self, grid: str, axis: int, cells: int) -> list[tuple[str, str]]:
        """The cells around each location along an axis, [B, P], each with its weight; a cell outside the map weighs 0.

        Locations are clipped to one cell outside the map ("border": to the map), where the two cells of the linear
        interpolation coincide: (high - low) is 0 or 1.
        """
        add = self.builder.add
        half = (cells - 1) / 2
        scaled = add(
            "Mul",
            add("Gather", grid, self.builder.constant(axis), axis=2),
            self._number(half if int_attribute(self.node, "align_corners", 0) else cells / 2),
        )
        outside = 0 if string_attribute(self.node, "padding_mode", "zeros") == "border" else 1
        location = self._clip(add("Add", scaled, self._number(half)), -outside, cells - 1 + outside)
        if string_attribute(self.node, "mode", "bilinear") == "nearest":
            nearest = add("Round", location)  # halves to even, as GridSample does
            inside = self._clip(nearest, 0, cells - 1)
            beyond = add("Abs", add("Sub", nearest, inside))
            return [(inside, add("Sub", self._number(1), beyond))]
        below = add("Floor", location)
        low = self._clip(below, 0, cells - 1)
        high = add("Min", add("Add", below, self._number(1)), self._number(cells - 1))
        near = add("Sub", location, low)
        return [(low, add("Sub", self._number(1), add("Abs", near))), (high, add("Mul", near, add("Sub", high, low)))]

    def _clip(self, name: str, low: float, high: float) -> str:
        return self.builder.add("Clip", name, self._number(low), self._number(high))

    def _number(self, value: float) -> str:
        return self.builder.constant(value, np.float32)
