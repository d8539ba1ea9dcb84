"""The one in-memory form of a detection set, whatever layout it was read from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgedetr.bundle import ClassInfo
from edgedetr.errors import DataError
from edgedetr.options import check


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


@dataclass(frozen=True)
class DataConfig:
    """Which splits serve which purpose; an empty name means "the usual one that is there"."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    train_split: str = "train"
    select_split: str = ""          # picks the best epoch while training; usual: val, else the verify split
    verify_split: str = ""          # the drop is measured here, and nothing is chosen by it; usual: test, else val
    strict: bool = False            # fail on the first unreadable or degenerate item instead of leaving it out

    def __post_init__(self) -> None:
        check(self, "data")

    def resolve(self, present: Iterable[str]) -> DataConfig:
        """The same with every empty name filled in from the splits that are present.

        Errors: DataError when a named or needed split is missing.
        """
        names = list(present)
        verify = self.verify_split or next((name for name in ("test", "val") if name in names), "")
        select = self.select_split or ("val" if "val" in names else verify)
        for purpose, name in (("train", self.train_split), ("select", select), ("verify", verify)):
            if name not in names:
                raise DataError(f"the {purpose} split {name or 'test or val'!r} is not in this set (there: "
                                f"{', '.join(sorted(names)) or 'none'}); "
                                f"name another with --set data.{purpose}_split=NAME")
        return replace(self, select_split=select, verify_split=verify)
