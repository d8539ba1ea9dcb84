"""From an output of a file back to the tensors that it is made from, by their numbers on images.

A tensor is the class logits where its sigmoid or softmax is what the file gives; it is the boxes where its corners, or
its centers, are. Names and patterns of nodes are not relied on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper

from edgedetr.errors import ExportError, first_line
from edgedetr.importing.box_format import LAYOUTS, Layout, from_corners, to_corners
from edgedetr.importing.class_format import BOTH, Activation, apply
from edgedetr.onnx_graph.index import FLOATS, GraphIndex
from edgedetr.runtime.backends.onnxruntime import plain_session

# Of these operators only the first input carries the values that are decoded; the others are places and sizes.
_BY_PLACE = {
    "Gather",
    "GatherElements",
    "GatherND",
    "TopK",
    "Reshape",
    "Expand",
    "Tile",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Split",
    "ReduceMax",
    "ReduceSum",
    "Pad",
    "Resize",
    "Clip",
}
_MOVING = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Transpose")
# Behind class outputs these leave no logits, whichever range the numbers have.
_BENDING = {
    "Exp",
    "HardSigmoid",
    "Log",
    "LogSoftmax",
    "Pow",
    "Reciprocal",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Tanh",
}
NEAREST = 40  # tensors that are looked at, from an output backwards
CLOSE = 2e-5  # of probabilities; of boxes, per unit


@dataclass(frozen=True)
class Block:
    """Rows in a tensor of the graph: [N, C], wherever the tensor has axes of size 1.

    turned    the tensor has [C, N]
    columns   first and last + 1 of those that are meant; None = all
    """

    tensor: str
    turned: bool = False
    columns: tuple[int, int] | None = None

    def rows(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """[N, C] of one image."""
        value = plain(values[self.tensor])
        value = value.T if self.turned else value
        return value if self.columns is None else value[:, slice(*self.columns)]


def plain(value: np.ndarray) -> np.ndarray:
    """[N, C] of [1, N, C], [1, 1, N, C] or [N, 1, C]."""
    while value.ndim > 2 and value.shape[0] == 1:
        value = value[0]
    return value[:, 0] if value.ndim == 3 and value.shape[1] == 1 else value


def upstream(graph: GraphIndex, output: str) -> Iterator[str]:
    """Computed float tensors that an output's values come from, those nearest to the output first."""
    order = {id(node): number for number, node in enumerate(graph.nodes)}
    waiting = [output]
    chosen: dict[int, NodeProto] = {}
    while waiting:
        node = graph.producers.get(waiting.pop())
        if node is None or order[id(node)] in chosen:
            continue
        chosen[order[id(node)]] = node
        waiting.extend(node.input[:1] if node.op_type in _BY_PLACE else node.input)
    for number in sorted(chosen, reverse=True):
        for name in chosen[number].output:
            if name and graph.types.get(name) in FLOATS and name not in graph.constants:
                yield name


def ends_in_sigmoid(graph: GraphIndex, output: str) -> bool:
    """Whether an output is what a Sigmoid gives, moved or picked at most."""
    node = _maker(graph, output, _MOVING)
    return node is not None and node.op_type == "Sigmoid"


def bent_by(graph: GraphIndex, output: str) -> str | None:
    """The operator that makes an output's values other than logits, by more than a factor and an offset; or None."""
    node = _maker(graph, output, (*_MOVING, "Neg", "Mul", "Add", "Sub", "Div", "Concat"))
    return node.op_type if node is not None and node.op_type in _BENDING else None


def _maker(graph: GraphIndex, output: str, passed: Sequence[str]) -> NodeProto | None:
    """The first node behind an output that is none of the passed kinds; of several inputs, the first computed one."""
    node = graph.producers.get(output)
    while node is not None and node.op_type in passed:
        node = next((graph.producers[name] for name in node.input if name in graph.producers), None)
    return node


def matrices(graph: GraphIndex, output: str) -> list[str]:
    """Those of `upstream` that are two-dimensional but for axes of size 1, the nearest NEAREST."""
    found = []
    for name in upstream(graph, output):
        shape = graph.shape(name)
        if shape is not None and None not in shape and len([size for size in shape if size and size > 1]) <= 2:
            found.append(name)
    return list(dict.fromkeys(found))[:NEAREST]


def run(model: ModelProto, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Values of inner tensors and outputs of a graph, for each feed."""
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = plain_session(
        probe.SerializeToString(),
        optimize="basic",
        spin=False,
        error=ExportError,
        fix="export the model again, as float32 and with operators of ONNX alone",
    )
    try:
        return [dict(zip(names, session.run(list(names), feed))) for feed in feeds]
    except Exception as error:  # the library's exceptions share no public base class
        raise ExportError(
            f"the graph does not run on an image in ONNX Runtime ({first_line(error)}); say its size "
            "with --input HxW, or export the model again"
        ) from error


def blocks_of(name: str, value: np.ndarray, rows: int, widths: Sequence[int]) -> list[Block]:
    """How a tensor may hold [rows, one of widths]."""
    shape = plain(value).shape
    if len(shape) != 2:
        return []
    found = [Block(name)] if shape[0] == rows and shape[1] in widths else []
    return found + ([Block(name, turned=True)] if shape[1] == rows and shape[0] in widths else [])


def logits_of(
    scores: Sequence[np.ndarray], names: Sequence[str], values: Sequence[dict[str, np.ndarray]]
) -> tuple[Block, Activation, int] | None:
    """The tensor whose activation the scores [N, K] of some images are, and its columns; None where none is."""
    count, width = scores[0].shape
    for name in names:
        for block in blocks_of(name, values[0][name], count, (width, width + 1)):
            logits = [block.rows(value) for value in values]
            for activation in BOTH:
                if activation == "sigmoid" and logits[0].shape[1] != width:
                    continue
                if all(
                    np.abs(apply(one, activation)[:, :width] - other).max() <= CLOSE
                    for one, other in zip(logits, scores)
                ):
                    return block, activation, logits[0].shape[1]
    return None


@dataclass(frozen=True)
class Conversion:
    """boxes given = boxes in `block`, from one layout to another, times (x, y).

    Where source and target are one, the graph keeps the layout, whichever it is.
    """

    block: Block
    source: Layout
    target: Layout
    factor: tuple[float, float]

    @property
    def same(self) -> bool:
        return self.source == self.target


def conversion_of(
    boxes: Sequence[np.ndarray],
    names: Sequence[str],
    values: Sequence[dict[str, np.ndarray]],
    factors: Sequence[tuple[float, float]],
    same: bool = False,
) -> Conversion | None:
    """The tensor that the boxes [N, 4] of some images are another layout of; None where the graph converts nothing.

    factors   (x, y) that the conversion may multiply by
    same      the tensor that they are a multiple of, instead
    """
    count = len(boxes[0])
    given = np.concatenate(boxes).astype(np.float64)
    for name in names:
        for block in blocks_of(name, values[0][name], count, (4,)):
            found = converts(np.concatenate([block.rows(value) for value in values]), given, factors, same)
            if found is not None:
                return Conversion(block, *found)
    return None


def converts(
    inner: np.ndarray, given: np.ndarray, factors: Sequence[tuple[float, float]], same: bool = False
) -> tuple[Layout, Layout, tuple[float, float]] | None:
    """From which layout to which, and times what, boxes [n, 4] become those given; None where they do not.

    same   also where the layout stays
    """
    inner = inner.astype(np.float64)
    for source in LAYOUTS:
        corners = to_corners(inner, source)
        for target in LAYOUTS:
            if (source == target) != same or (same and source != "cxcywh"):
                continue
            for factor in factors:
                made = from_corners(corners, target) * np.array(factor * 2)
                for one in (made, np.clip(made, 0, np.array(factor * 2))):
                    if np.abs(one - given).max(initial=0) <= CLOSE * max(factor) * max(1.0, np.abs(inner).max()):
                        return source, target, factor
    return None
