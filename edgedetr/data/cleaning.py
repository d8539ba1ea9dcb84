"""From what a layout says to samples that can be trusted: every odd item is named, every unusable one is left out.

Policy. Left out, with a fatal finding: an image that is missing, unreadable, too large, or of another size than its
annotation says; every image of an id that several have, for nothing says whose the boxes are; a box that is no four
finite numbers, has no area, or lies outside the image; an object of an unknown class; all boxes of a split where they
look like 0..1 instead of pixels. Boxes that stick out are cut to the image, and of equal boxes one is kept, both with
a finding. `strict` turns fatal findings into a DataError.

An annotated size that is the file's size before its EXIF rotation is another size too: some tools write such files with
boxes on the stored image, others on the upright one, and nothing in the file tells which.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgedetr import boxes as box
from edgedetr.bundle import ClassInfo
from edgedetr.data import images
from edgedetr.data.detection_set import DetectionSet, Finding, Sample
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_text

log = logging.getLogger(__name__)

STICKS_OUT = 0.5  # pixels beyond the border that are cut without a word: writers round (YOLO has six decimals)
NUMBER = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")
SHOWN = 5  # findings spelled out in a message


class UnusableSplit(DataError):
    """Nothing of a split can be used; `findings` say why."""

    def __init__(self, message: str, findings: Iterable[Finding]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


@dataclass(frozen=True)
class RawObject:
    """One object as the layout gives it. xyxy in pixels, or in 0..1 where the image says `relative`."""

    label: int
    xyxy: tuple[float, float, float, float]
    crowd: bool = False
    area: float | None = None


@dataclass
class RawImage:
    """One image as the layout gives it; `size` is the (height, width) it states, if it states one."""

    image_id: int
    path: Path
    size: tuple[int, int] | None = None
    relative: bool = False
    objects: list[RawObject] = field(default_factory=list)
    original_id: int | str | None = None


@dataclass
class RawSplit:
    """One split as read, before any image file was looked at."""

    classes: tuple[ClassInfo, ...]
    images: list[RawImage]
    findings: list[Finding]
    listed: int | None = None  # images in the annotations, where some are not among `images`


def numbers(values: object, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers, or None for anything else (strings, booleans, NaN, another length)."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return None
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        return None
    try:
        found = tuple(float(value) for value in values)
    except OverflowError:  # an int of a thousand digits
        return None
    return found if all(math.isfinite(value) for value in found) else None


def as_number(value: object) -> object:
    """The number that a short text writes ("12.5", "1e1"), anything else as it is: some writers quote every value."""
    if not isinstance(value, str) or not NUMBER.fullmatch(text := value.strip()):
        return value
    return float(text)


def read_names(file: Path) -> list[str]:
    """Class names, one a line. Errors: DataError where there is none."""
    names = [line.strip() for line in read_text(file, DataError).splitlines() if line.strip()]
    if not names:
        raise DataError(f"{file}: empty; expected class names, one a line")
    return names


def class_infos(names: Iterable[str]) -> tuple[ClassInfo, ...]:
    """Classes of a layout that has no ids of its own: the index is the id."""
    return tuple(ClassInfo(index, index, name) for index, name in enumerate(names))


def finish(raw: RawSplit, *, name: str, root: Path, strict: bool) -> DetectionSet:
    """Look at every image file and clean every box.

    Errors: DataError where nothing is left, and under `strict` where anything was left out.
    """
    findings = list(raw.findings)
    findings += equal_names(raw.classes)
    samples = []
    fractions = _fractions(raw.images)
    for image in raw.images:
        sample = _sample(image, findings, fractions)
        if sample is not None:
            samples.append(sample)
    fatal = [finding for finding in findings if finding.fatal]
    if strict and fatal:
        raise DataError(
            f"{root} [{name}]: {summary(fatal)}; strict reading accepts none; "
            f"run: edgedetr data check {root}\n" + _listed(fatal)
        )
    if not samples:
        listed = raw.listed if raw.listed is not None else len(raw.images)
        raise UnusableSplit(
            f"{root} [{name}]: no usable image ({listed} listed, "
            f"{summary(fatal) or 'none left out'}); expected at least one; "
            f"run: edgedetr data check {root}\n" + _listed(fatal),
            findings,
        )
    if fatal:
        log.warning("%s [%s]: left out %s; for the list, run: edgedetr data check %s", root, name, summary(fatal), root)
    return DetectionSet(name, root, tuple(samples), raw.classes, tuple(findings))


def summary(findings: Iterable[Finding]) -> str:
    """`2 degenerate-box, 1 missing-image with 4 objects`, the most frequent first."""
    counts: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    for finding in findings:
        counts[finding.kind] += 1
        # A finding about one box is that object, and needs no second number.
        objects[finding.kind] += finding.objects
    return ", ".join(
        f"{count} {kind}" + (f" with {objects[kind]} objects" if objects[kind] not in (0, count) else "")
        for kind, count in counts.most_common()
    )


def equal_names(classes: Sequence[ClassInfo]) -> list[Finding]:
    """A note for each name that several classes have, and for each class without one."""
    counts = Counter(info.name for info in classes)
    ids = {name: [info.category_id for info in classes if info.name == name] for name in counts if counts[name] > 1}
    empty = [info.category_id for info in classes if not info.name.strip()]
    return [
        Finding("empty-class-name", str(number), f"the class with the id {number} has an empty name; give it one")
        for number in empty
    ] + [
        Finding(
            "equal-class-names",
            name,
            f"the classes with the ids {', '.join(map(str, of))} are all called "
            f"{name!r}; they are kept apart by their ids",
        )
        for name, of in ids.items()
    ]


def _fractions(found: Iterable[RawImage]) -> bool:
    """Whether all boxes lie within 0..1 although the layout gives pixels: a writer has divided by the size."""
    corners = [thing.xyxy for image in found if not image.relative for thing in image.objects]
    return bool(corners) and all(min(box) >= -0.01 and max(box) <= 1.01 for box in corners)


def _listed(findings: list[Finding]) -> str:
    lines = [f"  {finding.kind}: {finding.where}: {finding.what}" for finding in findings[:SHOWN]]
    return "\n".join(lines + ([f"  and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []))


def _sample(image: RawImage, findings: list[Finding], fractions: bool) -> Sample | None:
    where, count = str(image.path), len(image.objects)
    try:
        height, width = images.probe(image.path)
    except images.ImageMissing as error:
        findings.append(Finding("missing-image", where, str(error), True, count))
        return None
    except images.ImageTooLarge as error:
        findings.append(Finding("too-large-image", where, str(error), True, count))
        return None
    except (DataError, OSError) as error:
        findings.append(Finding("unreadable-image", where, str(error), True, count))
        return None
    if image.size is not None and image.size != (height, width):
        what = (
            f"annotated as {image.size[1]} x {image.size[0]}, the upright file is {width} x {height} (width x height)"
        )
        if max(abs(image.size[0] - height), abs(image.size[1] - width)) > 1:
            why = (
                "the boxes may belong to the image before or after its EXIF rotation"
                if image.size == (width, height)
                else "the boxes belong to another image"
            )
            findings.append(Finding("size-mismatch", where, f"{what}; {why}", True, count))
            return None
        findings.append(Finding("size-mismatch", where, what + "; one pixel, boxes taken as they are"))
    things = image.objects
    if fractions and things and max(height, width) > 2:
        findings.append(
            Finding(
                "box-in-fractions",
                where,
                "all boxes of this split lie within 0..1, as "
                f"{_shown(things[0].xyxy)} does; expected pixels of {width} x {height}; "
                "multiply them by the size",
                True,
                count,
            )
        )
        things = []
    return _cleaned(image, things, height, width, findings)


def _cleaned(image: RawImage, things: list[RawObject], height: int, width: int, findings: list[Finding]) -> Sample:
    where = str(image.path)
    rows, labels, crowd, areas = [], [], [], []
    met: set[tuple[object, ...]] = set()
    repeated = below = 0
    for thing in things:
        found = _clipped(thing, image.relative, height, width, where, findings)
        if found is None:
            continue
        # Two objects of one class in one place, to a hundredth of a pixel, are one object written twice.
        same = (thing.label, thing.crowd, *(round(float(value), 2) for value in found))
        if same in met:
            repeated += 1
            continue
        met.add(same)
        below += bool(min(found[2] - found[0], found[3] - found[1]) < 1)
        rows.append(found)
        labels.append(thing.label)
        crowd.append(thing.crowd)
        full = float(box.area(found))
        areas.append(min(thing.area, full) if thing.area is not None else full)
    if repeated:
        findings.append(
            Finding(
                "duplicate-box",
                where,
                f"{repeated} of {repeated + len(rows)} objects repeat another's box and class; one of each was kept",
                False,
                repeated,
            )
        )
    if below:
        findings.append(
            Finding(
                "box-below-a-pixel",
                where,
                f"{below} of {len(rows)} boxes are less than a pixel wide "
                "or high; no detector finds them, and they count in AP",
            )
        )
    return Sample(
        image.image_id,
        image.path,
        height,
        width,
        boxes=np.array(rows, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array(crowd, dtype=bool),
        areas=np.array(areas, dtype=np.float64),
        original_id=image.original_id,
    )


def _shown(corners: Iterable[float]) -> list[float]:
    return [round(float(value), 2) for value in corners]


def _clipped(
    thing: RawObject, relative: bool, height: int, width: int, where: str, findings: list[Finding]
) -> np.ndarray | None:
    corners = np.array(thing.xyxy, dtype=np.float64)
    if relative:
        corners *= [width, height, width, height]
    shown = _shown(corners)
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        findings.append(Finding("degenerate-box", where, f"box {shown} (x0, y0, x1, y1) has no area", True, 1))
        return None
    cut = box.clip(corners, height, width)
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        findings.append(
            Finding("box-outside", where, f"box {shown} lies outside the {width} x {height} image", True, 1)
        )
        return None
    if np.abs(cut - corners).max() > STICKS_OUT:
        findings.append(
            Finding("box-cut", where, f"box {shown} sticks out of the {width} x {height} image and was cut to it")
        )
    return cut
