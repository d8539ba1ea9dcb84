"""Check and clean what a reader of a layout returns: every problem is reported, unusable items are left out.

Left out, with a fatal issue: an image that is missing, unreadable, too large, or of another size than annotated; all
images that share one id, because their boxes cannot be assigned; a box that is not four finite numbers, has no area, or
is outside the image; an object of an unknown class; all boxes of a split whose values look like 0..1 instead of pixels.
Boxes that extend beyond the image are clipped, and of equal boxes one is kept, both with an issue. `strict` turns fatal
issues into a DataError.

An annotated size equal to the file's size before its EXIF rotation also counts as another size: some tools write boxes
on the stored image, others on the upright one, and the file does not record which.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgedetr import boxes as box
from edgedetr.bundle import ClassInfo
from edgedetr.data import images
from edgedetr.data.detection_set import DataIssue, DetectionSet, Sample
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_text

log = logging.getLogger(__name__)

ROUNDING = 0.5  # pixels beyond the border that are clipped without an issue: writers round (YOLO has six decimals)
NUMBER = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")
SHOWN = 5  # issues listed in a message


class UnusableSplit(DataError):
    """No image of a split is usable; `issues` are the reasons."""

    def __init__(self, message: str, issues: Iterable[DataIssue]) -> None:
        super().__init__(message)
        self.issues = tuple(issues)


@dataclass(frozen=True)
class RawObject:
    """One object as read from the layout. xyxy in pixels, or in 0..1 where the image is `relative`.

    degrees   by which the box is turned about its center; the box around it is used
    """

    label: int
    xyxy: tuple[float, float, float, float]
    crowd: bool = False
    area: float | None = None
    degrees: float = 0.0


@dataclass
class RawImage:
    """One image as read from the layout; `size` is the annotated (height, width), if there is one."""

    image_id: int
    path: Path
    size: tuple[int, int] | None = None
    relative: bool = False
    objects: list[RawObject] = field(default_factory=list)
    original_id: int | str | None = None


@dataclass
class RawSplit:
    """One split as read, before any image file is opened."""

    classes: tuple[ClassInfo, ...]
    images: list[RawImage]
    issues: list[DataIssue]
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


def turn(value: object) -> float:
    """The angle of a box, in degrees; whole turns, and values that are no number, are 0."""
    found = numbers([as_number(value)], 1)
    return 0.0 if found is None else found[0] % 360


def as_number(value: object) -> object:
    """The number in a short text ("12.5", "1e1"), any other value unchanged: some writers quote every value."""
    if not isinstance(value, str) or not NUMBER.fullmatch(text := value.strip()):
        return value
    return float(text)


def read_names(file: Path, *, numbered: bool = False) -> list[str]:
    """Class names, one per line; empty lines at the end count for nothing.

    numbered   objects name their class by the number of its line: no line between names may be empty then, because
               tools disagree whether it has a number

    Errors: DataError where there is none, or an empty line that has to be a name.
    """
    names = [line.strip() for line in read_text(file, DataError).rstrip().splitlines()]
    if not any(names):
        raise DataError(f"{file}: empty; expected class names, one per line")
    if numbered and "" in names:
        raise DataError(
            f"{file}, line {names.index('') + 1}: empty, so the numbers of the classes after it are uncertain; remove "
            "the line if they were counted without it, else write a name there"
        )
    return [name for name in names if name]


def class_infos(names: Iterable[str]) -> tuple[ClassInfo, ...]:
    """Classes of a layout without category ids: the index is the id."""
    return tuple(ClassInfo(index, index, name) for index, name in enumerate(names))


def clean(raw: RawSplit, *, name: str, root: Path, strict: bool) -> DetectionSet:
    """Open every image file and clean every box.

    Errors: DataError where no image is usable, and with `strict` where anything is left out.
    """
    issues = list(raw.issues)
    issues += equal_names(raw.classes)
    samples = []
    fractions = _all_fractions(raw.images)
    for image in raw.images:
        sample = _sample(image, issues, fractions)
        if sample is not None:
            samples.append(sample)
    fatal = [issue for issue in issues if issue.fatal]
    if strict and fatal:
        raise DataError(
            f"{root} [{name}]: {summary(fatal)}; strict reading accepts none; "
            f"run: edgedetr data check {root}\n" + _listing(fatal)
        )
    if not samples:
        listed = raw.listed if raw.listed is not None else len(raw.images)
        raise UnusableSplit(
            f"{root} [{name}]: no usable image ({listed} listed, "
            f"{summary(fatal) or 'none left out'}); expected at least one; "
            f"run: edgedetr data check {root}\n" + _listing(fatal),
            issues,
        )
    if fatal:
        log.warning("%s [%s]: left out %s; for the list, run: edgedetr data check %s", root, name, summary(fatal), root)
    return DetectionSet(name, root, tuple(samples), raw.classes, tuple(issues))


def summary(issues: Iterable[DataIssue]) -> str:
    """`2 degenerate-box, 1 missing-image with 4 objects`, the most frequent first."""
    counts: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    for issue in issues:
        counts[issue.kind] += 1
        # An issue about one box is one object: a second number would repeat it.
        objects[issue.kind] += issue.objects
    return ", ".join(
        f"{count} {kind}" + (f" with {objects[kind]} objects" if objects[kind] not in (0, count) else "")
        for kind, count in counts.most_common()
    )


def equal_names(classes: Sequence[ClassInfo]) -> list[DataIssue]:
    """One issue for each name that several classes share, wholly or nearly, and for each class with an empty name."""
    counts = Counter(info.name for info in classes)
    ids = {name: [info.category_id for info in classes if info.name == name] for name in counts if counts[name] > 1}
    empty = [info.category_id for info in classes if not info.name.strip()]
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault(" ".join(unicodedata.normalize("NFC", name).casefold().split()), []).append(name)
    return (
        [
            DataIssue(
                "similar-class-names",
                of[0],
                f"{' and '.join(map(repr, of))} differ in case, spaces or Unicode form alone, and are classes of "
                "their own; if they are one, rename one of them in the annotations",
            )
            for key, of in alike.items()
            if key and len(of) > 1
        ]
        + [
            DataIssue("empty-class-name", str(number), f"the class with the id {number} has an empty name; give it one")
            for number in empty
        ]
        + [
            DataIssue(
                "equal-class-names",
                name,
                f"the classes with the ids {', '.join(map(str, of))} are all called "
                f"{name!r}; they are distinguished by their ids",
            )
            for name, of in ids.items()
        ]
    )


def _all_fractions(found: Iterable[RawImage]) -> bool:
    """Whether all boxes are within 0..1 although the layout has pixels: the writer divided by the image size."""
    corners = [item.xyxy for image in found if not image.relative for item in image.objects]
    return bool(corners) and all(min(box) >= -0.01 and max(box) <= 1.01 for box in corners)


def _listing(issues: list[DataIssue]) -> str:
    lines = [f"  {issue.kind}: {issue.where}: {issue.what}" for issue in issues[:SHOWN]]
    return "\n".join(lines + ([f"  and {len(issues) - SHOWN} more"] if len(issues) > SHOWN else []))


def _sample(image: RawImage, issues: list[DataIssue], fractions: bool) -> Sample | None:
    where, count = str(image.path), len(image.objects)
    try:
        height, width = images.probe(image.path)
    except images.ImageMissing as error:
        issues.append(DataIssue("missing-image", where, str(error), True, count))
        return None
    except images.ImageTooLarge as error:
        issues.append(DataIssue("too-large-image", where, str(error), True, count))
        return None
    except (DataError, OSError) as error:
        issues.append(DataIssue("unreadable-image", where, str(error), True, count))
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
            issues.append(DataIssue("size-mismatch", where, f"{what}; {why}", True, count))
            return None
        issues.append(DataIssue("size-mismatch", where, what + "; one pixel, the boxes are used unchanged"))
    objects = image.objects
    if fractions and objects and max(height, width) > 2:
        issues.append(
            DataIssue(
                "box-in-fractions",
                where,
                "all boxes of this split are within 0..1, as "
                f"{_shown(objects[0].xyxy)} does; expected pixels of {width} x {height}; "
                "multiply them by the size",
                True,
                count,
            )
        )
        objects = []
    return _clean_sample(image, objects, height, width, issues)


def _clean_sample(
    image: RawImage, objects: list[RawObject], height: int, width: int, issues: list[DataIssue]
) -> Sample:
    where = str(image.path)
    rows, labels, crowd, areas = [], [], [], []
    seen: set[tuple[object, ...]] = set()
    repeated = below = 0
    for item in objects:
        found = _clipped(item, image.relative, height, width, where, issues)
        if found is None:
            continue
        # Two objects of one class with equal boxes, to a hundredth of a pixel, are one object written twice.
        same = (item.label, item.crowd, *(round(float(value), 2) for value in found))
        if same in seen:
            repeated += 1
            continue
        seen.add(same)
        below += bool(min(found[2] - found[0], found[3] - found[1]) < 1)
        rows.append(found)
        labels.append(item.label)
        crowd.append(item.crowd)
        full = float(box.area(found))
        areas.append(min(item.area, full) if item.area is not None else full)
    if turned := sum(item.degrees != 0 for item in objects):
        what = f"{turned} of {len(objects)} boxes are turned, as CVAT writes them; the upright box around each is used"
        issues.append(DataIssue("turned-box", where, what))
    if repeated:
        issues.append(
            DataIssue(
                "duplicate-box",
                where,
                f"{repeated} of {repeated + len(rows)} objects repeat another's box and class; one of each was kept",
                False,
                repeated,
            )
        )
    if below:
        issues.append(
            DataIssue(
                "box-below-a-pixel",
                where,
                f"{below} of {len(rows)} boxes are less than a pixel wide "
                "or high; no detector can detect them, and they count in AP",
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
    item: RawObject, relative: bool, height: int, width: int, where: str, issues: list[DataIssue]
) -> np.ndarray | None:
    corners = np.array(item.xyxy, dtype=np.float64)
    if relative:
        corners *= [width, height, width, height]
    if item.degrees:
        corners = box.around_turned(corners, item.degrees)
    shown = _shown(corners)
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        issues.append(DataIssue("degenerate-box", where, f"box {shown} (x0, y0, x1, y1) has no area", True, 1))
        return None
    cut = box.clip(corners, height, width)
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        issues.append(DataIssue("box-outside", where, f"box {shown} is outside the {width} x {height} image", True, 1))
        return None
    if np.abs(cut - corners).max() > ROUNDING:
        issues.append(
            DataIssue("box-cut", where, f"box {shown} extends beyond the {width} x {height} image and was clipped")
        )
    return cut
