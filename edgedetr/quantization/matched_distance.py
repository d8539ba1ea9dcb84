"""How far the detections of a changed model (student) are from those of the float model (teacher), on one image.

Raw outputs cannot be compared tensor by tensor: a model that selects its queries by top-k may give the same objects in
another order, and most queries are background. Here the teacher's detections are matched with the student's queries,
by the pair costs of the set criterion (Carion et al. 2020, section 3.1), and what differs is weighed by the teacher's
confidence: binary cross-entropy of the classes, as a distillation loss has it, 5 L1 and 2 (1 - GIoU) of the boxes, the
weights of the same criterion. Detections that only the student has are added. No labels are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from edgedetr import boxes as box
from edgedetr.options import one_of
from edgedetr.runtime.backends.base import RawOutputs

LEAST_SCORE, MOST_DETECTIONS = 0.05, 100  # of the teacher that count: fewer would ignore what recall is made of
SPURIOUS = 0.3  # score from which an unmatched query of the student counts as a detection
CLASS_COST, L1, GIOU = 2.0, 5.0, 2.0  # of the criterion; the class weighs 2 in matching, as in focal-loss members
TINY = 1e-7  # probabilities are kept away from 0 and 1 by this much


@dataclass(frozen=True)
class QueryOutputs:
    """One image's outputs as probabilities.

    probabilities   [N, K] or, by softmax, [N, K + 1] with "no object" last; float64
    boxes           [N, 4] cx, cy, w, h in [0, 1]; float64
    scores          [N] of each query's best class
    activation      "sigmoid" or "softmax"
    """

    probabilities: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    activation: str

    @classmethod
    def of(cls, logits: np.ndarray, boxes: np.ndarray, activation: str) -> QueryOutputs:
        """logits [N, K] or [N, K + 1], boxes [N, 4]."""
        one_of("activation", activation, ("sigmoid", "softmax"))
        z = logits.astype(np.float64)
        if activation == "softmax":
            exponent = np.exp(z - z.max(axis=1, keepdims=True))
            p = exponent / exponent.sum(axis=1, keepdims=True)
            scores = p[:, :-1].max(axis=1)
        else:
            small = np.exp(-np.abs(z))  # never overflows
            p = np.where(z >= 0, 1, small) / (1 + small)
            scores = p.max(axis=1)
        return cls(p, boxes.astype(np.float64), scores, activation)

    @property
    def labels(self) -> np.ndarray:
        """[N] the best class of each query, "no object" left out."""
        classes = self.probabilities[:, :-1] if self.activation == "softmax" else self.probabilities
        return classes.argmax(axis=1)


def distances(teacher: RawOutputs, student: RawOutputs, activation: str, *, by_identity: bool) -> np.ndarray:
    """[B] float64: the distance of each image of a batch; 0 where both outputs are equal.

    by_identity   query i of the one is query i of the other, as in members with fixed queries; otherwise they are
                  matched, so that the order of the queries does not matter
    """
    return np.array(
        [
            distance(
                QueryOutputs.of(teacher.logits[i], teacher.boxes[i], activation),
                QueryOutputs.of(student.logits[i], student.boxes[i], activation),
                by_identity=by_identity,
            )
            for i in range(len(teacher.logits))
        ]
    )


def distance(teacher: QueryOutputs, student: QueryOutputs, *, by_identity: bool) -> float:
    """The distance of one image.

    The mean over the teacher's detections, weighed by their scores, of cross-entropy (without the teacher's own
    entropy) + 5 L1 + 2 (1 - GIoU), plus the scores of the student's detections that match none of them, as far as they
    exceed those that the teacher itself has beyond MOST_DETECTIONS.
    """
    found = detections_of(teacher)
    matched = found if by_identity else match(teacher, student, found)
    extra = _unmatched_mass(student, matched) - _unmatched_mass(teacher, found)
    if len(found) == 0:
        return max(extra, 0.0)
    apart = (
        divergence(teacher, student, found, matched)
        + L1 * np.abs(teacher.boxes[found] - student.boxes[matched]).sum(axis=1)
        + GIOU * (1 - _giou(teacher.boxes[found], student.boxes[matched]))
    )
    weights = teacher.scores[found]
    return float((weights * apart).sum() / weights.sum()) + max(extra, 0.0)


def detections_of(teacher: QueryOutputs) -> np.ndarray:
    """[S] queries of the teacher that count, the most confident first; equal scores keep their order."""
    order = np.argsort(-teacher.scores, kind="stable")[:MOST_DETECTIONS]
    return order[teacher.scores[order] >= LEAST_SCORE]


def match(teacher: QueryOutputs, student: QueryOutputs, found: np.ndarray) -> np.ndarray:
    """[S] the student's query for each of the teacher's detections, one to one, with the least cost in all.

    The cost of a pair: 2 |difference of the probability of the teacher's class| + 5 L1 + 2 (1 - GIoU).
    """
    labels = teacher.labels[found]
    classes = np.abs(teacher.probabilities[found, labels][:, None] - student.probabilities[:, labels].T)
    corners = np.abs(teacher.boxes[found][:, None] - student.boxes[None]).sum(axis=2)
    overlap = _giou(teacher.boxes[found][:, None], student.boxes[None])
    cost = CLASS_COST * classes + L1 * corners + GIOU * (1 - overlap)
    rows, columns = linear_sum_assignment(cost)
    matched = np.empty(len(found), np.intp)
    matched[rows] = columns
    return matched


def divergence(teacher: QueryOutputs, student: QueryOutputs, found: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """[S] cross-entropy of the classes less the teacher's entropy: 0 where both agree.

    sigmoid: summed over the classes, each on its own; softmax: over all classes and "no object".
    """
    p = np.clip(teacher.probabilities[found], TINY, 1 - TINY)
    q = np.clip(student.probabilities[matched], TINY, 1 - TINY)
    total = p * np.log(p / q)
    if teacher.activation == "sigmoid":
        total = total + (1 - p) * np.log((1 - p) / (1 - q))
    return np.asarray(np.maximum(total.sum(axis=1), 0.0))


def _unmatched_mass(outputs: QueryOutputs, matched: np.ndarray) -> float:
    """Sum of the scores of at least SPURIOUS of the queries that are not matched."""
    rest = np.delete(outputs.scores, matched)
    return float(rest[rest >= SPURIOUS].sum())


def _giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Generalized IoU of boxes cx, cy, w, h, which broadcast: [..., 4], [..., 4] -> [...] in [-1, 1].

    Rezatofighi et al. 2019, algorithm 1. Equal boxes have 1, also without area.
    """
    one, other = box.cxcywh_to_xyxy(a), box.cxcywh_to_xyxy(b)
    overlap = box.area(_corners(np.maximum(one, other), np.minimum(one, other)))
    hull = box.area(_corners(np.minimum(one, other), np.maximum(one, other)))
    union = box.area(one) + box.area(other) - overlap
    same = np.abs(one - other).max(axis=-1) == 0
    iou = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    empty = np.divide(hull - union, hull, out=np.zeros_like(hull), where=hull > 0)
    return np.where(same, 1.0, iou - empty)


def _corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.concatenate([low[..., :2], high[..., 2:]], axis=-1)
