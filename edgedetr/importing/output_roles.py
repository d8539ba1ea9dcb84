"""Which outputs of a file are what, by their shapes and numbers on images: names count only where several fit.

raw       numbers per class [B, N, K] and boxes [B, N, 4] of every query (transformers, RF-DETR)
joined    both in one tensor: [B, N, 4 + K] or [B, 4 + K, N] (ultralytics)
decoded   the chosen objects: labels, boxes, scores [B, n], or one tensor [B, n, 6] that holds these
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgedetr.errors import ExportError, UsageError
from edgedetr.importing.class_format import are_probabilities
from edgedetr.importing.trace_outputs import Block, plain
from edgedetr.onnx_graph.index import GraphIndex

# As the libraries name them: classes, boxes. Only where shapes leave several.
PAIRS = (
    ("logits", "pred_boxes"),
    ("pred_logits", "pred_boxes"),
    ("labels", "dets"),
    ("scores", "boxes"),
    ("pred_logits", "boxes"),
    ("logits", "boxes"),
)
Values = Sequence[dict[str, np.ndarray]]  # of every output, for each image
Column = tuple[str, "int | None"]  # a tensor, and which of its columns


@dataclass(frozen=True)
class Dense:
    """Numbers per class and a box of every query. kind is "raw" or "joined"."""

    kind: str
    scores: Block
    boxes: Block


@dataclass(frozen=True)
class Chosen:
    """The objects that the file itself chooses: labels, scores and the first of four columns of boxes."""

    labels: Column
    scores: Column
    boxes: tuple[str, int]
    kind: str = "decoded"

    def rows(self, values: dict[str, np.ndarray]) -> Rows:
        """Of one image, the most confident first."""
        name, first = self.boxes
        scores, labels = (_column(values, ref) for ref in (self.scores, self.labels))
        order = np.argsort(-scores, kind="stable")
        return Rows(labels[order].astype(np.int64), plain(values[name])[order, first : first + 4], scores[order])


@dataclass(frozen=True)
class Rows:
    """labels [n] int64, boxes [n, 4] as the file gives them, scores [n] falling."""

    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def roles(graph: GraphIndex, names: Sequence[str], values: Values, asked: Sequence[str] = ()) -> Dense | Chosen:
    """What the outputs are; ExportError that lists them where none of the forms fits, or several do.

    asked   names of the outputs to use, where the caller says it
    """
    lost = [name for name in asked if name not in names]
    if lost:
        raise UsageError(
            f"--outputs {','.join(asked)}: the file has no output {lost[0]!r}; expected some of {', '.join(names)}"
        )
    used = list(asked) or list(names)
    shapes = {name: plain(values[0][name]).shape for name in used}
    if len(asked) == 2:
        pairs = [(asked[0], asked[1])]
    else:
        pairs = [(one, other) for one in used for other in used if one != other and _is_pair(shapes, one, other)]
        pairs = [pair for pair in pairs if _may_be_boxes(pair[1], values)]
    chosen = _chosen(used, values) if len(asked) != 2 else None
    if chosen is not None:
        return chosen
    if len(pairs) > 1:
        pairs = _by_name(pairs)
    if len(pairs) == 1 and _is_pair(shapes, *pairs[0]):
        return Dense("raw", Block(pairs[0][0]), Block(pairs[0][1]))
    if len(pairs) > 1:
        listed = " or ".join(f"--outputs {one},{other}" for one, other in pairs[:4])
        raise ExportError(f"{len(pairs)} pairs of outputs may be classes and boxes; say which: {listed}")
    if len(used) == 1 and len(shapes[used[0]]) == 2:
        found = _taken_apart(graph, used[0], values)
        if found is not None:
            return found
    listed = ", ".join(f"{name} {list(values[0][name].shape)}" for name in names)
    raise ExportError(
        f"the graph gives {listed}; expected one of: logits [B, N, K] and boxes [B, N, 4]; labels, "
        "boxes, scores [B, n]; or one [B, N, 4 + K], [B, 4 + K, N] or [B, n, 6]; export the detector "
        "without other outputs, or name those that count: --outputs CLASSES,BOXES"
    )


def _column(values: dict[str, np.ndarray], ref: Column) -> np.ndarray:
    name, column = ref
    return values[name].reshape(-1) if column is None else plain(values[name])[:, column]


def _is_pair(shapes: dict[str, tuple[int, ...]], scores: str, boxes: str) -> bool:
    one, other = shapes[scores], shapes[boxes]
    return len(one) == len(other) == 2 and one[0] == other[0] and other[1] == 4


def _may_be_boxes(name: str, values: Values) -> bool:
    """Whether width and height could be positive in one reading, and the numbers are no shares of one whole."""
    boxes = np.concatenate([plain(value[name]) for value in values])
    ordered = max((boxes[:, 2:] >= -1e-4).mean(), (boxes[:, 2:] - boxes[:, :2] >= -1e-4).mean()) > 0.98
    return bool(ordered) and not bool(np.abs(boxes.sum(1) - 1).max() < 1e-3)


def _by_name(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    lower = {(one.lower(), other.lower()): (one, other) for one, other in pairs}
    named = next((lower[pair] for pair in PAIRS if pair in lower), None)
    return pairs if named is None else [named]


def _chosen(names: Sequence[str], values: Values) -> Chosen | None:
    """labels, boxes, scores as outputs of their own; or boxes with a score in one [n, 5], and labels."""
    flat = [name for name in names if _is_flat(values[0][name])]
    for boxes in names:
        shape = plain(values[0][boxes]).shape
        if len(shape) != 2 or shape[1] not in (4, 5) or boxes in flat:
            continue
        fitting = [name for name in flat if values[0][name].size == shape[0]]
        labels = [name for name in fitting if _are_labels([value[name] for value in values])]
        scores = [name for name in fitting if _are_scores([value[name] for value in values]) and name not in labels]
        if shape[1] == 4 and len(labels) == len(scores) == 1:
            return Chosen((labels[0], None), (scores[0], None), (boxes, 0))
        if shape[1] == 5 and len(labels) == 1 and len(fitting) == 1:
            return Chosen((labels[0], None), (boxes, 4), (boxes, 0))
    return None


def _is_flat(value: np.ndarray) -> bool:
    """[n] or [1, n] or [1, n, 1]."""
    return value.ndim == 1 or (value.ndim == 2 and value.shape[0] == 1) or (value.ndim == 3 and value.shape[2] == 1)


def _are_labels(columns: Sequence[np.ndarray]) -> bool:
    every = np.concatenate([column.reshape(-1) for column in columns])
    if np.issubdtype(every.dtype, np.integer):
        return True
    return bool(np.isfinite(every).all() and (every == np.round(every)).all() and every.min(initial=0) >= -1)


def _are_scores(columns: Sequence[np.ndarray]) -> bool:
    every = np.concatenate([column.reshape(-1) for column in columns])
    return np.issubdtype(every.dtype, np.floating) and bool(len(every)) and are_probabilities(every)


def _taken_apart(graph: GraphIndex, name: str, values: Values) -> Dense | Chosen | None:
    """One output as boxes and classes, or as chosen objects."""
    rows = [plain(value[name]) for value in values]
    if rows[0].shape[1] == 6:
        found = _six(name, rows)
        if found is not None:
            return found
    fits = [turned for turned in (False, True) if rows[0].shape[0 if turned else 1] > 4]
    traced = _concat(graph, name)
    found_blocks = []
    for turned in fits:
        wide = np.concatenate([row.T if turned else row for row in rows])
        count = wide.shape[1]
        for first in (0, count - 4):
            told = traced is not None and len(traced) == 1
            allowed = traced is None or (turned, first) in traced
            if allowed and (told or _plausible(wide[:, first : first + 4])):
                others = (4, count) if first == 0 else (0, count - 4)
                found_blocks.append(
                    Dense("joined", Block(name, turned, others), Block(name, turned, (first, first + 4)))
                )
    if len(found_blocks) > 1:
        raise ExportError(
            f"output {name} {list(values[0][name].shape)} may hold boxes in {len(found_blocks)} places; "
            "expected [B, N, 4 + K] or [B, 4 + K, N]; export the model with two outputs, boxes and "
            "classes"
        )
    return found_blocks[0] if found_blocks else None


def _plausible(boxes: np.ndarray) -> bool:
    """Whether columns may be boxes: most centers or corners are well inside; class scores are mostly near 0."""
    inside = (boxes[:, 2:] >= -1e-4).mean() > 0.98 and np.median(boxes[:, :2], axis=0).min() > 0.03
    return bool(inside) and not bool(np.abs(boxes.sum(1) - 1).max() < 1e-3)  # shares of one whole: softmax


def _six(name: str, rows: Sequence[np.ndarray]) -> Chosen | None:
    """x, y, x, y, score and class in any order that the numbers tell, or None."""
    columns = np.concatenate(rows).T
    labels = [place for place in (5, 4, 0, 1) if _are_labels([columns[place]]) and columns[place].max() < 10_000]
    for label in labels:
        for score in (4, 5, 0, 1):
            rest = sorted({*range(6)} - {label, score})
            if score != label and rest[-1] - rest[0] == 3 and _are_scores([columns[score]]):
                corners = columns[rest]
                if (corners[2:] >= corners[:2] - 1e-4).mean() > 0.98 or (corners[2:] >= 0).mean() > 0.98:
                    return Chosen((name, label), (name, score), (name, rest[0]))
    return None


def _concat(graph: GraphIndex, name: str) -> list[tuple[bool, int]] | None:
    """How the Concat behind an output joins: along the rows, [4 + K, N], or not; where 4 begin. None: unknown."""
    turned = False
    while (node := graph.producers.get(name)) is not None:
        if node.op_type == "Concat":
            shapes = [graph.shape(one) or [] for one in node.input]
            rank = len(shapes[0])
            axis = next((item.i for item in node.attribute if item.name == "axis"), 0) % max(rank, 1)
            sizes = [shape[axis] for shape in shapes if len(shape) == rank]
            if rank < 2 or 4 not in sizes or None in sizes or axis < rank - 2:
                return None
            return [
                ((axis == rank - 2) != turned, sum(one or 0 for one in sizes[:place]))
                for place, size in enumerate(sizes)
                if size == 4
            ]
        if node.op_type == "Transpose":
            perm = next((list(item.ints) for item in node.attribute if item.name == "perm"), [])
            turned ^= perm[-2:] == [len(perm) - 1, len(perm) - 2]
        elif node.op_type not in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
            return None
        name = node.input[0]
    return None
