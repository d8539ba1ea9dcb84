"""Whether two lists of objects are the same, where equal scores may have come in another order."""

from __future__ import annotations

import numpy as np

from edgedetr.runtime.detections import Detections


def agree(found: Detections, expected: Detections, *, pixels: float, score: float) -> bool:
    """Every object of one is in the other, within `pixels` of a box side and `score` of its confidence.

    Where scores are as low as the last of a list, another object of that score may have come in.
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
    for box, confidence, class_id in zip(some.xyxy, some.confidence, some.class_id):
        alike = (np.abs(all_of.confidence - confidence) <= score) & (all_of.class_id == class_id)
        near = alike.any() and np.abs(all_of.xyxy[alike] - box).max(axis=1).min() <= pixels
        if not near and confidence - last > score:
            return False
    return True
