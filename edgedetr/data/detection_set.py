"""The one in-memory form of a detection set, whatever layout it was read from."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgedetr.bundle import ClassInfo
from edgedetr.errors import DataError, did_you_mean
from edgedetr.options import LATER, check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image and its objects, in pixels of the EXIF-upright image.

    boxes   [T, 4]  float64, x0, y0, x1, y1, inside the image
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
    original_id: int | str | None = None  # the set's own id, where it is no whole number of 64 bits; else None


@dataclass(frozen=True)
class Finding:
    """Something wrong or odd in a set: `kind` is a stable word (for counting), `where` a file, `what` a sentence."""

    kind: str
    where: str
    what: str
    fatal: bool = False  # the item was left out (and --strict fails)
    objects: int = 0  # how many annotated objects were left out with it


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


def display_names(classes: Sequence[ClassInfo]) -> list[str]:
    """One name for each class, all different: `helmet (id 3)` where two classes are called helmet."""
    counts = Counter(info.name for info in classes)
    return [info.name if counts[info.name] == 1 else f"{info.name} (id {info.category_id})" for info in classes]


def matched(found: DetectionSet, classes: Sequence[ClassInfo], whose: str) -> DetectionSet:
    """The same set with the classes of `whose` (a model, another split), matched by name whatever ids and order are.

    A class that only one side has is no error where it has no object here.
    Errors: DataError where an object's class is not among `classes`, or where a name that is there twice does not tell.
    """
    if found.classes == tuple(classes):
        return found
    here, there = (
        [unicodedata.normalize("NFC", info.name).strip() for info in part] for part in (found.classes, classes)
    )
    if len(set(map(str.casefold, here))) == len(here) and len(set(map(str.casefold, there))) == len(there):
        here, there = [name.casefold() for name in here], [name.casefold() for name in there]
    exact = {(name, info.category_id): info.index for name, info in zip(there, classes)}
    names = [info.name for info in classes]
    used = {int(label) for sample in found.samples for label in np.unique(sample.labels)}
    index = np.full(len(found.classes), -1, np.int64)
    for name, info in zip(here, found.classes):
        if (name, info.category_id) in exact:
            index[info.index] = exact[name, info.category_id]
        elif there.count(name) == 1 and here.count(name) == 1:
            index[info.index] = classes[there.index(name)].index
        elif info.index in used:
            what = (
                "is the name of several classes; expected names that differ, or the same ids on both sides"
                if name in there
                else f"is not among {', '.join(names[:20])}{did_you_mean(info.name, names)}"
            )
            raise DataError(
                f"{found.root} [{found.name}]: has objects of the class {info.name!r}, which in {whose} "
                f"{what}; rename the class in the data set, or take another --data"
            )
    samples = tuple(replace(sample, labels=index[sample.labels]) for sample in found.samples)
    lacking = [info.name for name, info in zip(there, classes) if name not in here]
    if lacking:
        log.warning(
            "%s [%s]: does not name the class %s of %s; an object of it that is shown counts as false",
            found.root,
            found.name,
            ", ".join(map(repr, lacking[:20])),
            whose,
        )
    return replace(found, samples=samples, classes=tuple(classes))


def without_empty_classes(found: DetectionSet) -> DetectionSet:
    """The same set without the classes that have no object in it; indices move up, original ids stay."""
    present = sorted({int(label) for sample in found.samples for label in np.unique(sample.labels)})
    if not present:
        return found
    index = np.full(len(found.classes), -1, np.int64)
    index[present] = np.arange(len(present))
    classes = tuple(replace(found.classes[old], index=new) for new, old in enumerate(present))
    samples = tuple(replace(sample, labels=index[sample.labels]) for sample in found.samples)
    return replace(found, samples=samples, classes=classes)


@dataclass(frozen=True)
class DataConfig:
    """Which splits serve which purpose; an empty name means "the usual one that is there"."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    train_split: str = "train"
    select_split: str = ""  # picks the best epoch while training; usual: val, else the verify split
    verify_split: str = ""  # the drop is measured here, and nothing is chosen by it; usual: test, else val
    strict: bool = False  # fail on the first unreadable or degenerate item instead of leaving it out
    # Classes without an object in the train split are none of the model's.
    drop_empty_classes: bool = field(default=False, metadata=LATER)

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
                raise DataError(
                    f"the {purpose} split {name or 'test or val'!r} is not in this set (there: "
                    f"{', '.join(sorted(names)) or 'none'}); "
                    f"name another with --set data.{purpose}_split=NAME"
                )
        return replace(self, select_split=select, verify_split=verify)
