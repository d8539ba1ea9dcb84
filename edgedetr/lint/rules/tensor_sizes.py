"""Sizes that do not fit each other, where ONNX's own inference does not check them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import NodeProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.index import GraphIndex, int_attribute, ints_attribute, string_attribute

AGAIN = "export the model again"
_WINDOWS = ("Conv", "MaxPool", "AveragePool", "LpPool")
Shape = list[int | None]


def sizes(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Convolution weights, targets of Reshape, and bounds of Slice against their data."""
    for node in graph.nodes:
        shapes = [graph.shape(name) if name else None for name in node.input]
        data, other = [*shapes, None, None][:2]
        if node.op_type in ("Conv", "ConvTranspose") and data and other and len(data) == len(other) > 2:
            groups, transposed = max(int_attribute(node, "group", 1), 1), node.op_type == "ConvTranspose"
            wanted = other[0] if transposed else None if other[1] is None else other[1] * groups
            if None not in (data[1], wanted) and data[1] != wanted:
                yield node_issue(
                    node, f"the weight of {node.op_type} is for {wanted} channels, and its data has {data[1]}", AGAIN
                )
        folded = graph.folded(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        if folded is None or data is None or folded.dtype.kind not in "iu":
            continue
        if node.op_type == "Reshape" and None not in data:
            kept = [] if int_attribute(node, "allowzero", 0) else data  # 0 means the size of the data there
            target_sizes = [
                kept[axis] if size == 0 and axis < len(kept) else int(size)
                for axis, size in enumerate(folded.reshape(-1))
            ]
            have = math.prod(size or 0 for size in data)
            want = math.prod(size or 0 for size in target_sizes if size != -1)
            if (have % want if want else have) if -1 in target_sizes else have != want:
                yield node_issue(node, f"reshapes {data} to {target_sizes}, of another number of elements", AGAIN)
        if node.op_type == "Slice" and (len(node.input) < 4 or not node.input[3]) and folded.size != len(data):
            yield node_issue(node, f"slices {len(data)} dimensions with {folded.size} starts and names no axes", AGAIN)


def parameters(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Scales, shifts, slopes, groups, blocks and windows against their data."""
    for node in graph.nodes:
        shapes = [graph.shape(name) if name else None for name in node.input]
        data = shapes[0] if shapes else None
        error = _parameter_error(node, data, shapes[1:]) if data else ""
        if error:
            yield node_issue(node, f"{node.op_type} of {data}: {error}", AGAIN)


def _parameter_error(node: NodeProto, data: Shape, rest: list[Shape | None]) -> str:
    """The misfit, or an empty string."""
    kind, known = node.op_type, [shape for shape in rest if shape is not None and None not in shape]
    channels = data[1] if len(data) > 1 else None
    if kind == "LayerNormalization":
        axis = int_attribute(node, "axis", -1)
        wrong = [shape for shape in known if not _broadcasts(shape, data[axis:])]
        return f"a scale or shift of {wrong[0]}" if wrong and -len(data) <= axis < len(data) else ""
    if kind == "InstanceNormalization" and channels is not None:
        wrong = [shape for shape in known if shape != [channels]]
        return f"a scale or shift of {wrong[0]}" if wrong else ""
    if kind == "PRelu" and known:
        return "" if _broadcasts(known[0], data) else f"slopes of {known[0]}"
    if kind == "GroupNormalization" and channels is not None:
        groups = int_attribute(node, "num_groups", 1)
        return f"{channels} channels in {groups} groups" if groups < 1 or channels % groups else ""
    if kind == "DepthToSpace" and channels is not None:
        block = int_attribute(node, "blocksize", 1)
        return f"{channels} channels in blocks of {block}" if block < 1 or channels % block**2 else ""
    if kind in ("Conv", "ConvTranspose") and len(rest) > 1 and rest[0] and rest[1] and len(rest[0]) > 1:
        made = rest[0][0] if kind == "Conv" else (rest[0][1] or 0) * int_attribute(node, "group", 1)
        if None not in (made, rest[1][0]) and rest[1] != [made]:
            return f"a bias of {rest[1]} for {made} channels"
    if kind in _WINDOWS and string_attribute(node, "auto_pad", "NOTSET") == "NOTSET":
        return _window_error(node, data[2:], rest[0][2:] if kind == "Conv" and rest and rest[0] else [])
    return _einsum_error(string_attribute(node, "equation", ""), [data, *rest]) if kind == "Einsum" else ""


def _window_error(node: NodeProto, sizes: Shape, weight: Shape) -> str:
    window: Shape = [*ints_attribute(node, "kernel_shape")] or weight
    steps, pads = (
        ints_attribute(node, "dilations") or [1] * len(sizes),
        ints_attribute(node, "pads") or [0] * 2 * len(sizes),
    )
    if not len(window) == len(steps) == len(sizes) == len(pads) / 2:
        return ""
    for axis, (size, length, step) in enumerate(zip(sizes, window, steps)):
        room = None if size is None else size + pads[axis] + pads[axis + len(sizes)]
        if None not in (room, length) and (length or 0) * step - step + 1 > (room or 0):
            return f"a window of {window} that is larger than it"
    return ""


def _einsum_error(equation: str, shapes: list[Shape | None]) -> str:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or len(terms) != len(shapes):
        return ""
    seen: dict[str, set[int]] = {}
    for term, shape in zip(terms, shapes):
        if shape is not None and len(term) == len(shape):
            for letter, size in zip(term, shape):
                if size not in (None, 1):
                    seen.setdefault(letter, set()).add(size)
    wrong = [letter for letter, lengths in seen.items() if len(lengths) > 1]
    return f"{equation}, where {wrong[0]} is {' and '.join(map(str, sorted(seen[wrong[0]])))} long" if wrong else ""


def _broadcasts(shape: Shape, onto: Shape) -> bool:
    """Whether a shape can be broadcast to another; an open size fits any."""
    if len(shape) > len(onto):
        return False
    return all(size == 1 or other is None or size == other for size, other in zip(shape[::-1], onto[::-1]))
