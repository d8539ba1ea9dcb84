"""Detections of one image, with the fields of supervision.Detections."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, most confident first.

    xyxy         [n, 4]  float32, corners in pixels of the original (EXIF-upright) image
    confidence   [n]     float32, 0..1
    class_id     [n]     int64, contiguous class index
    data                 "class_name" [n] str, "category_id" [n] int64 (the data set's own id)

    `supervision.Detections(xyxy=d.xyxy, confidence=d.confidence, class_id=d.class_id, data=d.data)` takes it as it is.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    data: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.xyxy)

    def above(self, confidence: float) -> Detections:
        """Those with at least this confidence."""
        keep = self.confidence >= confidence
        return Detections(
            self.xyxy[keep],
            self.confidence[keep],
            self.class_id[keep],
            {name: values[keep] for name, values in self.data.items()},
        )
