"""How often one object is found twice: what non-maximum suppression would remove, and a DETR should not give.

One-to-one matching teaches a detector to answer once, but nothing in the architecture forbids a second answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgedetr import boxes as box
from edgedetr.runtime.detections import Detections

CONFIDENCE = 0.3  # what a viewer would be shown
OVERLAP = 0.7  # IoU of two boxes that mean one object


def doubled(detections: Mapping[int, Detections]) -> float | None:
    """Per cent of the detections shown that overlap a more confident one of their class; None where none is shown."""
    shown = twice = 0
    for found in detections.values():
        found = found.above(CONFIDENCE)
        order = np.argsort(-found.confidence, kind="stable")
        overlap = box.iou(found.xyxy[order].astype(np.float64), found.xyxy[order].astype(np.float64))
        alike = found.class_id[order][:, None] == found.class_id[order][None]
        shown += len(found)
        twice += int(np.triu(alike & (overlap >= OVERLAP), 1).any(axis=0).sum())
    return 100 * twice / shown if shown else None
