"""Find the tensors inside a graph that its outputs are computed from, by comparing values on images.

A tensor is the class logits if its sigmoid or softmax equals the file's scores; it is the boxes if its corners, or its
centers and sizes, equal the file's boxes. Names and patterns of nodes are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto

from edgedetr.importing.output_formats import (
    ACTIVATIONS,
    LAYOUTS,
    Activation,
    Layout,
    apply_activation,
    from_corners,
    to_corners,
)
from edgedetr.onnx_graph.index import FLOATS, GraphIndex
from edgedetr.onnx_graph.session import GraphSession

# What the user can do where a file does not load or run in ONNX Runtime.
RUN_FIX = "name its size with --input HxW, or export the model again, as float32 and with ONNX's own operators"
# Operators of which only the first input carries values; the other inputs are indices and sizes.
_FIRST_INPUT_ONLY = {
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
_DATA_MOVEMENT = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Transpose")
# The output of these operators is no logit, whatever its range.
_NONLINEAR = {
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
NEAREST = 40  # tensors that are compared, from an output backwards
TOLERANCE = 2e-5  # of probabilities; of boxes, relative to their unit


@dataclass(frozen=True)
class TensorSlice:
    """A matrix [N, C] in a tensor of the graph, which may have further axes of size 1.

    transposed   the tensor holds [C, N]
    columns      first and last + 1 of the columns that belong to it; None: all
    """

    tensor: str
    transposed: bool = False
    columns: tuple[int, int] | None = None

    def rows(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """[N, C] of one image."""
        value = as_matrix(values[self.tensor])
        value = value.T if self.transposed else value
        return value if self.columns is None else value[:, slice(*self.columns)]


def as_matrix(value: np.ndarray) -> np.ndarray:
    """[N, C] of [1, N, C], [1, 1, N, C] or [N, 1, C]."""
    while value.ndim > 2 and value.shape[0] == 1:
        value = value[0]
    return value[:, 0] if value.ndim == 3 and value.shape[1] == 1 else value


def upstream_tensors(graph: GraphIndex, output: str) -> Iterator[str]:
    """Computed float tensors that the values of an output come from, the nearest to the output first."""
    order = {id(node): number for number, node in enumerate(graph.nodes)}
    waiting = [output]
    passed: dict[int, NodeProto] = {}
    while waiting:
        node = graph.producers.get(waiting.pop())
        if node is None or order[id(node)] in passed:
            continue
        passed[order[id(node)]] = node
        waiting.extend(node.input[:1] if node.op_type in _FIRST_INPUT_ONLY else node.input)
    for number in sorted(passed, reverse=True):
        for name in passed[number].output:
            if name and graph.types.get(name) in FLOATS and name not in graph.constants:
                yield name


def ends_in_sigmoid(graph: GraphIndex, output: str) -> bool:
    """Whether an output is the result of a Sigmoid, reshaped or gathered at most."""
    node = _producer_behind(graph, output, _DATA_MOVEMENT)
    return node is not None and node.op_type == "Sigmoid"


def nonlinearity_behind(graph: GraphIndex, output: str) -> str | None:
    """The nonlinear operator (Sigmoid, Exp ...) before an output, scaled and shifted at most; or None."""
    node = _producer_behind(graph, output, (*_DATA_MOVEMENT, "Neg", "Mul", "Add", "Sub", "Div", "Concat"))
    return node.op_type if node is not None and node.op_type in _NONLINEAR else None


def _producer_behind(graph: GraphIndex, output: str, passed: Sequence[str]) -> NodeProto | None:
    """The nearest node before an output that is of none of the passed operators.

    Of a node with several inputs, the first computed one is followed.
    """
    node = graph.producers.get(output)
    while node is not None and node.op_type in passed:
        node = next((graph.producers[name] for name in node.input if name in graph.producers), None)
    return node


def upstream_matrices(graph: GraphIndex, output: str) -> list[str]:
    """The NEAREST of `upstream_tensors` that are matrices apart from axes of size 1."""
    found = []
    for name in upstream_tensors(graph, output):
        shape = graph.shape(name)
        if shape is not None and None not in shape and len([size for size in shape if size and size > 1]) <= 2:
            found.append(name)
    return list(dict.fromkeys(found))[:NEAREST]


def run_graph(
    model: ModelProto, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Values of the named tensors of a graph, for each feed."""
    session = GraphSession(model, names, optimize="basic", spin=False, fix=RUN_FIX)
    return [session.run(feed) for feed in feeds]


def slices_of(name: str, value: np.ndarray, rows: int, widths: Sequence[int]) -> list[TensorSlice]:
    """Ways in which a tensor may hold a matrix [rows, one of widths]."""
    shape = as_matrix(value).shape
    if len(shape) != 2:
        return []
    found = [TensorSlice(name)] if shape[0] == rows and shape[1] in widths else []
    return found + ([TensorSlice(name, transposed=True)] if shape[1] == rows and shape[0] in widths else [])


def find_logits(
    scores: Sequence[np.ndarray], names: Sequence[str], values: Sequence[dict[str, np.ndarray]]
) -> tuple[TensorSlice, Activation, int] | None:
    """The tensor whose sigmoid or softmax equals the scores [N, K] of some images, that activation, and its width."""
    count, width = scores[0].shape
    for name in names:
        for inner in slices_of(name, values[0][name], count, (width, width + 1)):
            logits = [inner.rows(value) for value in values]
            for activation in ACTIVATIONS:
                if activation == "sigmoid" and logits[0].shape[1] != width:
                    continue
                if all(
                    np.abs(apply_activation(one, activation)[:, :width] - other).max() <= TOLERANCE
                    for one, other in zip(logits, scores)
                ):
                    return inner, activation, logits[0].shape[1]
    return None


@dataclass(frozen=True)
class BoxConversion:
    """The file's boxes are those in `boxes`, converted from one layout to another and multiplied by (x, y).

    If source and target are equal, the graph keeps the layout, whichever it is.
    """

    boxes: TensorSlice
    source: Layout
    target: Layout
    factor: tuple[float, float]

    @property
    def keeps_layout(self) -> bool:
        return self.source == self.target


def find_box_conversion(
    boxes: Sequence[np.ndarray],
    names: Sequence[str],
    values: Sequence[dict[str, np.ndarray]],
    factors: Sequence[tuple[float, float]],
    same: bool = False,
) -> BoxConversion | None:
    """The tensor that the boxes [N, 4] of some images are converted from; None where the graph converts nothing.

    factors   (x, y) that the conversion may multiply by
    same      find the tensor that they are a multiple of, in the same layout
    """
    count = len(boxes[0])
    given = np.concatenate(boxes).astype(np.float64)
    for name in names:
        for inner in slices_of(name, values[0][name], count, (4,)):
            found = match_conversion(np.concatenate([inner.rows(value) for value in values]), given, factors, same)
            if found is not None:
                return BoxConversion(inner, *found)
    return None


def match_conversion(
    inner: np.ndarray, given: np.ndarray, factors: Sequence[tuple[float, float]], same: bool = False
) -> tuple[Layout, Layout, tuple[float, float]] | None:
    """Layouts and factor that convert boxes `inner` [n, 4] into `given`; None if there are none.

    same   the layout is kept
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
                    if np.abs(one - given).max(initial=0) <= TOLERANCE * max(factor) * max(1.0, np.abs(inner).max()):
                        return source, target, factor
    return None
