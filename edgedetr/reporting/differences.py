"""The images on which two stages differ most: which boxes agree, and which only one of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgedetr.evaluation.agreement import matched_pairs
from edgedetr.runtime.detections import Detections

CONFIDENCE = 0.3  # what somebody looking at detections would see
OVERLAP = 0.5  # COCO's loosest match


@dataclass(frozen=True)
class Difference:
    """One image. `pairs` [n, 2] are indices of the same object in both; the others are indices on one side only.

    score   confidences of what only one side has, plus the changes of confidence of what both have
    """

    image_id: int
    reference: Detections
    other: Detections
    pairs: np.ndarray
    only_reference: np.ndarray
    only_other: np.ndarray
    score: float


def difference(image_id: int, reference: Detections, other: Detections) -> Difference:
    """Pair detections of one class from the largest overlap down, and sum up what is left.

    A box of either side below CONFIDENCE takes part only as a partner, so that crossing the line is a small change.
    """
    first, second = matched_pairs(reference, other, OVERLAP)
    pairs = list(zip(first.tolist(), second.tolist()))
    seen = [(r, o) for r, o in pairs if max(reference.confidence[r], other.confidence[o]) >= CONFIDENCE]
    only_reference = _rest(reference, {r for r, _ in pairs})
    only_other = _rest(other, {o for _, o in pairs})
    score = float(reference.confidence[only_reference].sum() + other.confidence[only_other].sum())
    score += float(sum(abs(float(reference.confidence[r]) - float(other.confidence[o])) for r, o in seen))
    return Difference(
        image_id, reference, other, np.array(seen, np.int64).reshape(-1, 2), only_reference, only_other, score
    )


def most_different(
    reference: Mapping[int, Detections], other: Mapping[int, Detections], count: int
) -> list[Difference]:
    """The `count` images with the highest score, the highest first; images that agree exactly are left out."""
    found = [difference(image_id, reference[image_id], other[image_id]) for image_id in reference if image_id in other]
    found = [d for d in found if d.score > 0]
    return sorted(found, key=lambda d: (-d.score, d.image_id))[:count]


def _rest(detections: Detections, paired: set[int]) -> np.ndarray:
    return np.array(
        [n for n in range(len(detections)) if n not in paired and detections.confidence[n] >= CONFIDENCE], np.int64
    )
