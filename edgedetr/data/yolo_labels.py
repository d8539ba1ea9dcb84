"""Label files of the YOLO layout: find the one of each image, parse its lines, report those without an image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edgedetr.boxes import xyxy_to_cxcywh
from edgedetr.data.cleaning import RawImage, RawObject, numbers
from edgedetr.data.detection_set import DataIssue
from edgedetr.data.images import is_image
from edgedetr.data.listing import child, children, files, fold
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_text

LIMIT = 2 << 20  # bytes; 20,000 boxes
SEPARATE = 20  # invalid lines of one file that are reported one by one
FEWEST, BEYOND = 8, 0.25  # boxes of a split, and fraction beyond the image, from which another meaning is considered
SLACK = 0.01  # of the image: writers round, and cut boxes at the border differently
NOTES = frozenset({"classes", "notes", "labels", "predefined_classes", "train", "val", "valid", "test", "obj"})


class Labels:
    """The label files of one split.

    points   (points, numbers per point) of each pose; None = lines are boxes or polygons
    """

    def __init__(self, root: Path, classes: int, points: tuple[int, int] | None) -> None:
        self.root, self.classes, self.points = root, classes, points
        self.used: set[str] = set()
        self.label_folders: dict[Path, Path | None] = {}  # folder of images -> folder of labels
        self.listed: dict[Path, dict[str, Path]] = {}  # folder of labels -> label files by folded name
        self.lengths: Counter[int] = Counter()  # words of the lines that were read as polygons
        self.poses = self.found = 0

    def fill(self, image: RawImage, issues: list[DataIssue]) -> None:
        """Read the image's label file into it."""
        file = self.file_of(image.path)
        if file is None:
            issues.append(
                DataIssue("no-label-file", str(image.path), f"no {image.path.stem}.txt; the image has no objects")
            )
            return
        self.found += 1
        self.used.add(os.path.abspath(file))
        try:
            lines = read_text(file, DataError, limit=LIMIT).splitlines()
        except DataError as error:
            issues.append(
                DataIssue(
                    "unreadable-annotation", str(file), f"{error}; its objects are left out", True, object_lines(file)
                )
            )
            return
        bad = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            parsed = self._parse(line.split())
            if isinstance(parsed, RawObject):
                image.objects.append(parsed)
            else:
                bad.append(DataIssue(parsed[0], f"{file}:{number}", f"{line.strip()[:60]!r}: {parsed[1]}", True, 1))
        issues += bad[:SEPARATE]
        if len(bad) > SEPARATE:
            rest = len(bad) - SEPARATE
            issues.append(DataIssue(bad[SEPARATE].kind, str(file), f"and {rest} more such lines", True, rest))

    def close(self, folders: Sequence[Path], images: Sequence[Path], issues: list[DataIssue]) -> None:
        """Issues that are known after all images: label files without an image, shared label files, poses."""
        if len(images) > 1 and not self.found:
            there = self._labels_of(images[0].parent) or f"{self._expected(images[0].parent)}, which does not exist"
            issues.append(
                DataIssue(
                    "no-labels",
                    str(folders[0] if folders else self.root),
                    f"none of {len(images)} images has a label file; they were expected in {there}",
                )
            )
        owners: dict[Path, list[Path]] = {}
        for path in images:
            if (file := self.file_of(path)) is not None:
                owners.setdefault(file, []).append(path)
        issues += [
            DataIssue(
                "same-name",
                str(of[0].parent / of[0].stem),
                "several images with this stem share one label file; its objects cannot be assigned",
            )
            for of in owners.values()
            if len(of) > 1
        ]
        for folder in dict.fromkeys([*folders, *(path.parent for path in images)]):
            self._orphans(folder, issues)
        if self.poses:
            issues.append(
                DataIssue(
                    "pose-labels",
                    str(self.root),
                    f"{self.poses} lines have the points of a pose; their boxes are read and the points are not",
                )
            )
        elif len(self.lengths) == 1 and sum(self.lengths.values()) > 3:
            (length,) = self.lengths
            # Rotated boxes (9 words) always have four corners; polygons drawn by people have different numbers of them.
            if length != 9:
                issues.append(
                    DataIssue(
                        "perhaps-pose-labels",
                        str(self.root),
                        f"every line has {length} words and was "
                        "read as a polygon; if these are poses, data.yaml needs kpt_shape",
                    )
                )

    def _orphans(self, folder: Path, issues: list[DataIssue]) -> None:
        labels = self._labels_of(folder)
        if labels is None:
            return
        there = files(labels) if labels != folder else children(folder)
        images = {fold(str(path.relative_to(folder).with_suffix(""))) for path in files(folder) if is_image(path)}
        for file in there:
            absolute = os.path.abspath(file)
            if file.suffix.lower() != ".txt" or absolute in self.used or not os.path.isfile(file):
                continue
            self.used.add(absolute)  # folders may contain each other
            name = fold(str(file.relative_to(labels).with_suffix("")))
            if name in images or file.stem.lower() in NOTES or file.stem.lower().startswith("readme"):
                continue
            count = object_lines(file)
            if count or labels != folder:  # next to images, a text file without objects may be anything
                issues.append(
                    DataIssue(
                        "label-without-image",
                        str(file),
                        f"no image {file.stem} is in {folder}; its {count} objects are left out",
                        count > 0,
                        count,
                    )
                )

    def file_of(self, image: Path) -> Path | None:
        """The label file of an image: in the folder of labels, else next to the image."""
        labels = self._labels_of(image.parent)
        for folder in filter(None, dict.fromkeys((labels, image.parent))):
            exact = folder / f"{image.stem}.txt"
            if os.path.isfile(exact):
                return exact
            if folder not in self.listed:
                self.listed[folder] = (
                    {fold(path.name): path for path in children(folder)} if os.path.isdir(folder) else {}
                )
            other = self.listed[folder].get(fold(f"{image.stem}.txt"))
            if other is not None and os.path.isfile(other):
                return other
        return None

    def _labels_of(self, folder: Path) -> Path | None:
        """The label folder of a folder of images: .../images/a -> .../labels/a, ignoring case; else the same folder."""
        if folder not in self.label_folders:
            self.label_folders[folder] = self._find_labels(folder)
        return self.label_folders[folder]

    def _find_labels(self, folder: Path) -> Path | None:
        parts = folder.relative_to(self.root).parts if folder.is_relative_to(self.root) else ()
        at = [index for index, part in enumerate(parts) if part.lower() == "images"]
        if not at:
            return folder
        labels = child(self.root.joinpath(*parts[: at[-1]]), "labels")
        for part in parts[at[-1] + 1 :]:
            labels = child(labels, part) if labels is not None else None
        return labels

    def _expected(self, folder: Path) -> Path:
        """The folder where the labels of a folder's images belong; it may not exist."""
        parts = list(folder.relative_to(self.root).parts)
        at = max(index for index, part in enumerate(parts) if part.lower() == "images")
        return self.root.joinpath(*parts[:at], "labels", *parts[at + 1 :])

    def _parse(self, words: list[str]) -> RawObject | tuple[str, str]:
        """The object of a line, or the kind and the sentence of an issue."""
        values = numbers(_floats(words), len(words))
        pose = self._is_pose(words, values)
        polygon = not pose and len(words) >= 7 and len(words) % 2 == 1
        if values is None or not (pose or polygon or len(words) == 5):
            return "bad-box", (
                f"{len(words)} words; expected a class and cx cy w h, or a class and at least three "
                "corners, all finite numbers"
            )
        if values[0] != int(values[0]) or not 0 <= values[0] < self.classes:
            return "unknown-class", f"class {words[0][:40]}; known are 0..{self.classes - 1}"
        if max(abs(value) for value in (values[1:] if polygon else values[1:5])) > 2:
            return "bad-box", "coordinates far above 1; expected 0..1 of the image, not pixels"
        self.poses += pose
        if polygon:
            self.lengths[len(words)] += 1
            x, y = values[1::2], values[2::2]
            return RawObject(int(values[0]), (min(x), min(y), max(x), max(y)))
        cx, cy, w, h = values[1:5]
        return RawObject(int(values[0]), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))

    def _is_pose(self, words: list[str], values: tuple[float, ...] | None) -> bool:
        """Whether a line is a box with points: by kpt_shape, or by visibilities that are exactly 0, 1 or 2."""
        if self.points is not None:
            return len(words) == 5 + self.points[0] * self.points[1]
        if values is None or len(words) < 8 or len(words) % 3 != 2:
            return False
        seen = set(values[7::3])
        # A polygon along the border has zeros and ones too, but no 2, and an odd number of words.
        return seen <= {0.0, 1.0, 2.0} and (len(words) % 2 == 0 or 2.0 in seen)


def drop_misread(images: Sequence[RawImage], issues: list[DataIssue]) -> None:
    """Leave out every box of a split whose lines hold `x0 y0 x1 y1` or `x0 y0 w h` instead of `cx cy w h`.

    A single box can be any of them. All boxes together cannot: read in the other way, all end inside of their images;
    read as center and size, many extend beyond them.
    """
    corners = np.array([item.xyxy for image in images for item in image.objects])
    if len(corners) < FEWEST:
        return
    x, y, third, fourth = xyxy_to_cxcywh(corners).T  # as they are written
    beyond = (corners < -SLACK).any(1) | (corners > 1 + SLACK).any(1)
    fits = {
        "x0 y0 x1 y1": (third > x) & (fourth > y) & (np.maximum(third, fourth) <= 1 + SLACK),
        "x0 y0 w h": (np.maximum(x + third, y + fourth) <= 1 + SLACK),
    }
    meant = next((words for words, fitting in fits.items() if fitting.all()), "")
    if beyond.mean() < BEYOND or not meant:
        return
    for image in images:
        if image.objects:
            issues.append(
                DataIssue(
                    "box-in-corners",
                    str(image.path),
                    f"read as cx cy w h, {100 * beyond.mean():.0f} % of this split's boxes extend beyond their images; "
                    f"as {meant} none does; expected center and size in 0..1: convert the label files",
                    True,
                    len(image.objects),
                )
            )
            image.objects = []


def object_lines(file: Path) -> int:
    """Number of lines of a file that look like an object."""
    try:
        lines = [line.split() for line in read_text(file, DataError, limit=LIMIT).splitlines() if line.strip()]
    except DataError:
        return 0
    return sum(len(words) >= 5 and None not in _floats(words) for words in lines)


def _floats(words: Iterable[str]) -> list[float | None]:
    found: list[float | None] = []
    for word in words:
        try:
            found.append(float(word))
        except ValueError:
            found.append(None)
    return found
