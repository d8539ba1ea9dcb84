"""The one in-memory form of a detection set, whatever layout it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgedetr.bundle import ClassInfo


@dataclass(frozen=True)
class Sample:
    """One picture and its objects, in pixels of the EXIF-upright picture.

    boxes   [T, 4]  float64, x0, y0, x1, y1, inside the picture
    labels  [T]     int64, contiguous class index
    crowd   [T]     bool, regions that a detector may hit without gain or loss
    areas   [T]     float64, the annotation's own area (a mask's, where the set has masks), pixels^2
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class Finding:
    """Something wrong or odd in a set: `kind` is a stable word (for counting), `where` a file, `what` a sentence."""

    kind: str
    where: str
    what: str
    fatal: bool = False     # the item was left out (and --strict fails)


@dataclass(frozen=True)
class DetectionSet:
    """One split: samples in a stable order, classes in index order, and what was found while reading."""

    name: str
    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[ClassInfo, ...]
    findings: tuple[Finding, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.samples)
