"""A detection set in memory, the same for every layout on disk: samples, classes, splits, and issues found."""

from __future__ import annotations

import logging
import re
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


_SPLIT_SYNONYMS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


@dataclass(frozen=True)
class Sample:
    """One image and its objects, in pixels of the EXIF-upright image.

    boxes   [T, 4]  float64, x0, y0, x1, y1, inside the image
    labels  [T]     int64, contiguous class index
    crowd   [T]     bool, regions in which detections count neither as true nor as false positives
    areas   [T]     float64, the annotated area (of the mask, where the set has masks), pixels^2
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    original_id: int | str | None = None  # the id in the file, where it is not an integer of 64 bits; else None


@dataclass(frozen=True)
class DataIssue:
    """A problem in a data set: `kind` is a stable identifier (for counting), `where` a file, `what` a sentence."""

    kind: str
    where: str
    what: str
    fatal: bool = False  # the item was left out (and strict reading fails)
    objects: int = 0  # number of annotated objects left out with it


@dataclass(frozen=True)
class DetectionSet:
    """One split: samples in a stable order, classes in index order, and the issues found while reading."""

    name: str
    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[ClassInfo, ...]
    issues: tuple[DataIssue, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.samples)

    def evenly_spaced(self, count: int) -> tuple[Sample, ...]:
        """At most `count` samples at equal distances, with the first and the last; none of an empty set."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return tuple(self.samples[index] for index in chosen)


def canonical_split_name(name: str) -> str:
    """train, val or test for their usual names (valid, train2017, ...); any other name in lower case."""
    lower = name.lower()
    bare = re.sub(r"[-_]?(19|20)\d\d$", "", lower)
    bare = _SPLIT_SYNONYMS.get(bare, bare)
    return bare if bare in ("train", "val", "test") else lower


def display_names(classes: Sequence[ClassInfo]) -> list[str]:
    """A unique name for each class: `helmet (id 3)` where two classes are called helmet."""
    counts = Counter(info.name for info in classes)
    return [info.name if counts[info.name] == 1 else f"{info.name} (id {info.category_id})" for info in classes]


def match_classes(found: DetectionSet, classes: Sequence[ClassInfo], owner: str) -> DetectionSet:
    """The set with `classes` as its classes, matched by name; ids and order may differ.

    owner   "the model", or the split that has `classes`: for messages

    A class that only one side has is an error only where this set has objects of it.
    Errors: DataError where an object's class is not among `classes`, or where its name is ambiguous.
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
                f"{found.root} [{found.name}]: has objects of the class {info.name!r}, which in {owner} "
                f"{what}; rename the class in the data set, or take another --data"
            )
    samples = tuple(replace(sample, labels=index[sample.labels]) for sample in found.samples)
    lacking = [info.name for name, info in zip(there, classes) if name not in here]
    if lacking:
        log.warning(
            "%s [%s]: does not have the class %s of %s; detections of it count as false positives",
            found.root,
            found.name,
            ", ".join(map(repr, lacking[:20])),
            owner,
        )
    return replace(found, samples=samples, classes=tuple(classes))


def without_empty_classes(found: DetectionSet) -> DetectionSet:
    """The set without the classes that have no object in it; indices move up, category ids stay."""
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
    """Which split has which purpose; an empty name means the usual split that is present."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    train_split: str = "train"
    select_split: str = ""  # selects the best epoch while training; usual: val, else the verify split
    verify_split: str = ""  # the AP drop is measured on it, and nothing is selected by it; usual: test, else val
    strict: bool = False  # fail on the first unreadable or degenerate item instead of leaving it out
    # Classes without an object in the train split are not classes of the model.
    drop_empty_classes: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        check(self, "data")

    def resolve(self, present: Iterable[str]) -> DataConfig:
        """The configuration with every empty name filled in from the splits that are present.

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
