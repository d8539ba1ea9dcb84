"""How far two systems' detections differ, object by object: finer than AP, and without ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from edgedetr import boxes as box
from edgedetr.runtime.detections import Detections


@dataclass(frozen=True)
class Parity:
    """Detections of a system against a reference's, over the images that both have.

    objects     the reference's detections at or above the confidence threshold
    matched     share of them that the system has too, 0..1; None without any
    spurious    share of the system's detections above the threshold that the reference does not have; None without any
    score_*     |difference of confidence| of matched ones, mean and 99th percentile
    box_*       largest |difference of a corner coordinate| of matched ones, pixels of the image
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


def match(
    reference: Mapping[int, Detections], other: Mapping[int, Detections], *, confidence: float = 0.3, iou: float = 0.5
) -> Parity:
    """Compare one to one, same class, overlap at least `iou`, the largest overlap first.

    A partner needs only half the confidence: an object at 0.31 against 0.29 is the same object with another score.
    """
    objects = matched = shown = spurious = 0
    scores: list[np.ndarray] = []
    corners: list[np.ndarray] = []
    for image_id in reference.keys() & other.keys():
        a, b = reference[image_id].above(confidence / 2), other[image_id].above(confidence / 2)
        first, second = pairs(a, b, iou)
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
    return Parity(
        objects,
        matched / objects if objects else None,
        spurious / shown if shown else None,
        _mean(score),
        _p99(score),
        _mean(corner),
        _p99(corner),
    )


def pairs(a: Detections, b: Detections, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices ([n], [n]) of the same objects in both: same class, overlap >= iou, greedily by falling overlap."""
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


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _p99(values: np.ndarray) -> float | None:
    return float(np.percentile(values, 99)) if values.size else None
