"""How a file chooses its objects, told from what it chose: from which class logits and boxes, by which rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgedetr.importing.class_format import BOTH, Activation, apply
from edgedetr.importing.output_roles import Rows
from edgedetr.importing.trace_outputs import CLOSE, Block, Conversion, converts, plain

GAP = 1e-6  # between scores, below which objects may stand in either order


@dataclass(frozen=True)
class Selection:
    """logits      of all queries, `width` columns
    rule         "all": the best of queries x classes; "query": the best class of each query
    labels       the file's label for each class that it chose
    queries, clear   by image: which query each object is of [n], and whether its score tells it from its neighbors
    """

    logits: Block
    activation: Activation
    width: int
    rule: str
    labels: dict[int, int]
    queries: tuple[np.ndarray, ...]
    clear: tuple[np.ndarray, ...]


def selections(
    answers: Sequence[Rows], names: Sequence[str], values: Sequence[dict[str, np.ndarray]]
) -> Iterator[Selection]:
    """Every tensor and rule whose choice has the file's own scores and labels, nearest to the output first."""
    for name in names:
        shape = plain(values[0][name]).shape
        if len(shape) != 2:
            continue
        for turned in (False, True):
            block = Block(name, turned)
            logits = [block.rows(value) for value in values]
            for activation in BOTH:
                for rule in ("all", "query") if activation == "sigmoid" else ("query",):
                    found = _selection(answers, block, logits, activation, rule)
                    if found is not None:
                        yield found


def _selection(
    answers: Sequence[Rows], block: Block, logits: Sequence[np.ndarray], activation: Activation, rule: str
) -> Selection | None:
    labels: dict[int, int] = {}
    queries, clear = [], []
    for answer, one in zip(answers, logits):
        scores = apply(one, activation)
        scores = scores[:, :-1] if activation == "softmax" else scores
        count = len(answer.scores)
        if not scores.shape[1] or (scores.size if rule == "all" else len(scores)) < count:
            return None
        chosen = (
            scores if rule == "all" else np.where(np.arange(scores.shape[1]) == scores.argmax(1)[:, None], scores, -1)
        )
        order = np.argsort(-chosen, axis=None, kind="stable")[: count + 1]
        falling = chosen.reshape(-1)[order]
        if np.abs(falling[:count] - answer.scores).max(initial=0) > CLOSE:
            return None
        gaps = np.concatenate([[np.inf], -np.diff(falling), [np.inf]])
        told = (gaps[:count] > GAP) & (gaps[1 : count + 1] > GAP)
        query, place = np.unravel_index(order[:count], scores.shape)
        for ours, theirs in zip(place[told].tolist(), answer.labels[told].tolist()):
            if labels.setdefault(ours, theirs) != theirs:
                return None
        queries.append(query)
        clear.append(told)
    if len(set(labels.values())) < len(labels) or not any(told.any() for told in clear):
        return None
    return Selection(block, activation, logits[0].shape[1], rule, labels, tuple(queries), tuple(clear))


def boxes_of(
    found: Selection,
    answers: Sequence[Rows],
    names: Sequence[str],
    values: Sequence[dict[str, np.ndarray]],
    factors: Sequence[tuple[float, float]],
) -> Conversion | None:
    """The tensor whose rows, at the chosen queries, become the file's boxes; None where no tensor fits."""
    rows = len(found.logits.rows(values[0]))
    given = np.concatenate([answer.boxes[told] for answer, told in zip(answers, found.clear)]).astype(np.float64)
    kept: Conversion | None = None
    for name in names:
        shape = plain(values[0][name]).shape
        for turned in (False, True):
            if len(shape) != 2 or (shape[::-1] if turned else shape) != (rows, 4):
                continue
            block = Block(name, turned)
            inner = np.concatenate(
                [block.rows(value)[query][told] for value, query, told in zip(values, found.queries, found.clear)]
            )
            traced = converts(inner, given, factors)
            if traced is not None:
                return Conversion(block, *traced)
            if kept is None:
                same = converts(inner, given, factors, same=True)
                kept = None if same is None else Conversion(block, *same)
    return kept
