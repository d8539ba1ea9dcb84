"""How far two lists of detections agree: object by object over a data set, or as equal within tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from edgedetr import boxes as box
from edgedetr.runtime.postprocess import Detections


@dataclass(frozen=True)
class Agreement:
    """Detections of one model against those of a reference, over the images that both have.

    objects     detections of the reference at or above the confidence threshold
    matched     fraction of `objects` that the model also detects, 0..1; None where objects is 0
    spurious    fraction of the model's detections above the threshold that the reference lacks; None without any
    score_*     |difference of confidence| of matched detections, mean and 99th percentile
    box_*       largest |difference of a corner coordinate| of matched detections, pixels of the image
    """

    objects: int
    matched: float | None
    spurious: float | None
    score_mean: float | None
    score_p99: float | None
    box_mean: float | None
    box_p99: float | None

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def compare_detections(
    reference: Mapping[int, Detections], other: Mapping[int, Detections], *, confidence: float = 0.3, iou: float = 0.5
) -> Agreement:
    """Match detections by image id, one to one: same class, IoU at least `iou`, the largest IoU first.

    The counterpart needs only half the confidence: one object with the scores 0.31 and 0.29 is still one object.
    """
    objects = matched = shown = spurious = 0
    scores: list[np.ndarray] = []
    corners: list[np.ndarray] = []
    for image_id in reference.keys() & other.keys():
        a, b = reference[image_id].above(confidence / 2), other[image_id].above(confidence / 2)
        first, second = matched_pairs(a, b, iou)
        counts = a.confidence[first] >= confidence
        objects += int((a.confidence >= confidence).sum())
        matched += int(counts.sum())
        seen = b.confidence >= confidence
        shown += int(seen.sum())
        spurious += int(seen.sum()) - int(seen[second].sum())
        first, second = first[counts], second[counts]
        scores.append(np.abs(a.confidence[first].astype(np.float64) - b.confidence[second]))
        corners.append(np.abs(a.xyxy[first].astype(np.float64) - b.xyxy[second]).max(axis=1, initial=0))
    score = np.concatenate([np.zeros(0), *scores])
    corner = np.concatenate([np.zeros(0), *corners])
    return Agreement(
        objects,
        matched / objects if objects else None,
        spurious / shown if shown else None,
        _mean(score),
        _p99(score),
        _mean(corner),
        _p99(corner),
    )


def matched_pairs(a: Detections, b: Detections, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices ([n], [n]) of the same objects in both: same class, IoU >= iou, greedily from the largest IoU down."""
    overlap = box.iou(a.xyxy.astype(np.float64), b.xyxy.astype(np.float64))
    overlap[a.class_id[:, None] != b.class_id[None]] = 0
    row, column = np.nonzero(overlap >= iou)
    order = np.argsort(-overlap[row, column], kind="stable")
    free_a, free_b = np.ones(len(a), bool), np.ones(len(b), bool)
    first, second = [], []
    for i, j in zip(row[order], column[order]):
        if free_a[i] and free_b[j]:
            free_a[i] = free_b[j] = False
            first.append(i)
            second.append(j)
    return np.array(first, np.intp), np.array(second, np.intp)


def detections_allclose(found: Detections, expected: Detections, *, pixels: float, score: float) -> bool:
    """Whether both lists hold the same objects, in any order among equal scores.

    pixels   largest difference of a box side
    score    largest difference of a confidence

    An object whose score is within `score` of the last one in the other list may be missing there: both lists are cut
    at the same length, and a rounding difference decides which of two equal scores is cut off.
    """
    if len(found) != len(expected):
        return False
    if not len(found):
        return True
    if not np.allclose(found.confidence, expected.confidence, rtol=0, atol=score):
        return False
    return _contains(expected, found, pixels, score) and _contains(found, expected, pixels, score)


def _contains(all_of: Detections, some: Detections, pixels: float, score: float) -> bool:
    last = all_of.confidence[-1]
    for xyxy, confidence, class_id in zip(some.xyxy, some.confidence, some.class_id):
        candidates = (np.abs(all_of.confidence - confidence) <= score) & (all_of.class_id == class_id)
        near = candidates.any() and np.abs(all_of.xyxy[candidates] - xyxy).max(axis=1).min() <= pixels
        if not near and confidence - last > score:
            return False
    return True


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _p99(values: np.ndarray) -> float | None:
    return float(np.percentile(values, 99)) if values.size else None
