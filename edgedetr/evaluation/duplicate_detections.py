"""Duplicate detections: the percentage that non-maximum suppression would remove.

One-to-one matching trains a DETR to detect each object once, but the architecture does not enforce it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgedetr import boxes as box
from edgedetr.runtime.postprocess import Detections

CONFIDENCE = 0.3  # detections below it are not shown to a user
OVERLAP = 0.7  # IoU from which two boxes of one class mean one object


def duplicate_percentage(detections: Mapping[int, Detections]) -> float | None:
    """Percentage of shown detections that overlap a more confident one of their class; None where none is shown."""
    shown = duplicates = 0
    for found in detections.values():
        found = found.above(CONFIDENCE)
        order = np.argsort(-found.confidence, kind="stable")
        overlap = box.iou(found.xyxy[order].astype(np.float64), found.xyxy[order].astype(np.float64))
        same_class = found.class_id[order][:, None] == found.class_id[order][None]
        shown += len(found)
        duplicates += int(np.triu(same_class & (overlap >= OVERLAP), 1).any(axis=0).sum())
    return 100 * duplicates / shown if shown else None
