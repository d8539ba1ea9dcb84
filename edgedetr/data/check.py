"""Check a data set: statistics of splits and classes, and issues: unreadable or unlisted files, copies, near-copies.

Unlisted files are images in no split and label files of no image: a loose images/a.jpg next to images/train/, a
labels/test/ without its images, a split that data.yaml does not list.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from edgedetr.data import images, layouts, near_duplicates
from edgedetr.data.cleaning import UnusableSplit, summary
from edgedetr.data.detection_set import DataIssue, DetectionSet, Sample, display_names, match_classes
from edgedetr.data.listing import BROKEN_LINK, files, images_in
from edgedetr.data.yolo_labels import Labels, object_lines
from edgedetr.errors import DataError

SMALL, MEDIUM = 32.0**2, 96.0**2  # COCO's limits of small and medium, pixels^2 of the source image
IMBALANCE = 10.0  # objects of the most frequent class per object of the rarest, from which it is an issue
SHOWN = 20  # issues of one kind that `lines` lists; JSON has all
NAMED = 8  # files that one issue lists by name
DARK = 64  # of 255: white of a 14-bit file that is read as one of 16 bits is 63


@dataclass(frozen=True)
class SplitReport:
    """One split without what was left out."""

    name: str
    listed: int  # images in the annotations
    images: int  # usable ones
    without_objects: int
    objects: int
    crowd: int
    per_class: dict[str, int]
    small: int  # objects by COCO's area classes
    medium: int
    large: int
    objects_per_image: tuple[int, float, int]  # smallest, median, largest number
    sizes: dict[str, int]  # images of each "width x height", the ten most frequent


@dataclass(frozen=True)
class CheckReport:
    """Everything `edgedetr data check` prints."""

    root: Path
    layout: str
    splits: tuple[SplitReport, ...]
    issues: tuple[DataIssue, ...]

    @property
    def fatal(self) -> int:
        """Number of items that were left out."""
        return sum(issue.fatal for issue in self.issues)

    @property
    def objects_left_out(self) -> int:
        """Number of annotated objects that were left out, alone or with their image."""
        return sum(issue.objects for issue in self.issues if issue.fatal)

    def to_json(self) -> dict[str, object]:
        """Plain types for json.dumps."""
        return {
            "root": str(self.root),
            "layout": self.layout,
            "splits": [asdict(split) for split in self.splits],
            "left_out": self.fatal,
            "objects_left_out": self.objects_left_out,
            "counts": dict(Counter(issue.kind for issue in self.issues)),
            "findings": [asdict(issue) for issue in self.issues],
        }

    def lines(self) -> list[str]:
        """The report as text, one line each."""
        text = [f"{self.root}: {self.layout.upper()} layout"]
        for split in self.splits:
            least, median, most = split.objects_per_image
            text.append(
                f"{split.name}: {split.images} images ({split.without_objects} without objects), "
                f"{split.objects} objects, {least} / {median:g} / {most} per image (least / median / most)"
            )
            if split.crowd:
                text.append(f"  {split.crowd} of these objects are crowds or `difficult`: neither learned nor judged")
            percent = 100 / max(split.objects, 1)
            text.append(
                f"  sizes: {split.small * percent:.0f} % small, {split.medium * percent:.0f} % medium, "
                f"{split.large * percent:.0f} % large (below 32, below 96 px, above; COCO)"
            )
            text.append("  classes: " + ", ".join(f"{name} {count}" for name, count in split.per_class.items()))
            sizes = list(split.sizes.items())[:5]
            text.append("  images: " + ", ".join(f"{size} ({count})" for size, count in sizes))
        text.append(f"issues: {summary(self.issues) or 'none'}")
        if self.fatal:
            text.append(f"left out: {self.fatal} items, {self.objects_left_out} objects (alone or with their image)")
        by_kind: dict[str, list[DataIssue]] = defaultdict(list)
        for issue in self.issues:
            by_kind[issue.kind].append(issue)
        for kind, found in by_kind.items():
            for one in found[:SHOWN]:
                text.append(f"  {'left out' if one.fatal else 'note'}: {kind}: {one.where}: {one.what}")
            if len(found) > SHOWN:
                text.append(f"  {kind}: and {len(found) - SHOWN} more (all of them in --json)")
        return text


def check(
    path: str | Path, *, layout: layouts.Layout | None = None, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Read every split and decode every image.

    progress   called with (images checked, total images)
    Errors: DataError where `path` is not a data set or an annotation file is damaged; other problems become issues.
    """
    root = Path(path)
    kind = layout or layouts.detect(root)
    listed = layouts.splits(root, layout=layout)
    issues: list[DataIssue] = []
    sets, known = [], True
    for name in listed:
        try:
            sets.append(layouts.load(root, name, layout=layout))
        except UnusableSplit as error:
            issues += [DataIssue("unusable-split", name, str(error).split("\n")[0], True), *error.issues]
        except DataError as error:
            known = False  # the images of this split are unknown
            issues.append(DataIssue("unusable-split", name, str(error), True))
    done, total = 0, sum(len(found) for found in sets)
    digests: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    hashes: dict[str, list[tuple[Sample, np.ndarray | None]]] = {}
    reports = []
    for found in sets:
        issues += found.issues
        hashes[found.name] = []
        dark: list[Path] = []
        for sample in found.samples:
            try:
                with images.open_plain(sample.path) as stream:
                    content = stream.read()
                pixels = images.decode(sample.path)
                dark += [sample.path][: int(pixels.max() < DARK)]
                hashes[found.name].append((sample, near_duplicates.fingerprint(pixels)))
                digests[hashlib.sha256(content).hexdigest()].append((found.name, sample.path))
            except (DataError, OSError) as error:
                issues.append(DataIssue("unreadable-image", str(sample.path), str(error), True, len(sample.boxes)))
            done += 1
            if progress is not None:
                progress(done, total)
        issues += _dark(found.name, dark)
        whole = tuple(sample for sample, _ in hashes[found.name])
        if whole:
            reports.append(_report(replace(found, samples=whole), listed[found.name]))
        else:
            issues.append(DataIssue("unusable-split", found.name, "none of its images can be decoded", True))
    if known:
        listing = [sample.path for found in sets for sample in found.samples]
        try:
            issues += _unlisted_files(root, kind, listing, issues)
        except DataError as error:  # a folder in the root that belongs to another user
            issues.append(DataIssue("unreadable-folder", str(root), f"{error}; its content was not checked"))
    issues += _duplicates(digests)
    same = {frozenset(path for _, path in files) for files in digests.values() if len(files) > 1}
    issues += _near_copies(hashes, same)
    issues += _classes(sets, reports)
    return CheckReport(root, kind, tuple(reports), tuple(dict.fromkeys(issues)))


def _report(found: DetectionSet, listed: int) -> SplitReport:
    counts = [len(sample.boxes) for sample in found.samples]
    labels = np.concatenate([sample.labels for sample in found.samples] or [np.zeros(0, np.int64)])
    areas = np.concatenate([sample.areas for sample in found.samples] or [np.zeros(0)])
    per_class = np.bincount(labels, minlength=len(found.classes))
    sizes = Counter(f"{sample.width} x {sample.height}" for sample in found.samples)
    return SplitReport(
        name=found.name,
        listed=listed,
        images=len(found),
        without_objects=counts.count(0),
        objects=len(labels),
        crowd=int(sum(sample.crowd.sum() for sample in found.samples)),
        per_class={name: int(count) for name, count in zip(display_names(found.classes), per_class)},
        small=int((areas < SMALL).sum()),
        medium=int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        large=int((areas >= MEDIUM).sum()),
        objects_per_image=(min(counts), float(np.median(counts)), max(counts)) if counts else (0, 0.0, 0),
        sizes=dict(sizes.most_common(10)),
    )


def _dark(split: str, paths: list[Path]) -> list[DataIssue]:
    """An issue for images that are black to the eye: cameras and scanners write 10 to 14 bits into 16-bit files."""
    if not paths:
        return []
    what = (
        f"{len(paths)} images have no pixel of {DARK} or more, where white is 255: {_names(paths)}; 16-bit files are "
        "read with white at 65535: if theirs is 4095 (12 bits) or 16383, multiply their values to fill the range"
    )
    return [DataIssue("dark-image", split, what)]


def _near_copies(
    hashes: dict[str, list[tuple[Sample, np.ndarray | None]]], same: set[frozenset[Path]]
) -> list[DataIssue]:
    """Issues for images of a later split that are near-copies of one of an earlier; `same`: files with equal bytes."""
    issues = []
    for first, second in combinations([name for name in hashes if name != "trainval"], 2):
        (one, ours), (other, theirs) = (([s for s, _ in hashes[n]], [h for _, h in hashes[n]]) for n in (first, second))
        for a, b, bits in near_duplicates.nearest(ours, theirs):
            pair = {one[a].path, other[b].path}
            if not any(pair <= known for known in same):
                issues.append(
                    DataIssue(
                        "near-copy-across-splits",
                        str(other[b].path),
                        f"is nearly the same image as "
                        f"{one[a].path} of {first} ({bits} of {near_duplicates.BITS} bits differ); a score on "
                        f"{second} counts an image that is almost seen in training",
                    )
                )
    return issues


def _duplicates(digests: dict[str, list[tuple[str, Path]]]) -> list[DataIssue]:
    issues = []
    for copies in digests.values():
        # VOC's trainval contains train and val by design.
        apart = [(split, path) for split, path in copies if split != "trainval"]
        if len(apart) < 2:
            continue
        (first_split, first), *others = apart
        for split, path in others:
            if split != first_split:
                issues.append(
                    DataIssue(
                        "duplicate-across-splits",
                        str(path),
                        f"the same bytes as {first} of {first_split}; a score "
                        f"on {split} counts an image that was seen before",
                    )
                )
            else:
                issues.append(DataIssue("duplicate-image", str(path), f"the same bytes as {first}, both in {split}"))
    return issues


def _classes(sets: Sequence[DetectionSet], reports: Sequence[SplitReport]) -> list[DataIssue]:
    issues = []
    for found in sets[1:]:
        if found.classes == sets[0].classes:
            continue
        what = (
            f"classes {[info.name for info in found.classes][:20]}, but {sets[0].name} has "
            f"{[info.name for info in sets[0].classes][:20]} (names, ids or order)"
        )
        try:
            match_classes(found, sets[0].classes, sets[0].name)
            issues.append(DataIssue("classes-differ", found.name, f"{what}; they are matched by name"))
        except DataError as error:
            issues.append(DataIssue("classes-differ", found.name, f"{what}: {error}", True))
    for report in reports:
        absent = [name for name, count in report.per_class.items() if count == 0]
        if absent:
            issues.append(DataIssue("class-without-objects", report.name, f"no object of {', '.join(absent[:20])}"))
        present = {name: count for name, count in report.per_class.items() if count}
        if present and max(present.values()) > IMBALANCE * min(present.values()):
            most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
            issues.append(
                DataIssue("imbalance", report.name, f"{present[most]} objects of {most}, {present[least]} of {least}")
            )
    return issues


def _unlisted_files(
    root: Path, layout: str, listed: Iterable[Path], known_issues: Iterable[DataIssue]
) -> list[DataIssue]:
    """Issues for files that belong to no split, one for each folder; unlisted images are not fatal.

    listed         images of every split
    known_issues   issues up to now: their files are not reported again
    """
    broken: list[Path] = []
    present = images_in(root, broken=broken)
    reported = list(known_issues)
    known = {os.path.realpath(path) for path in listed} | {os.path.realpath(issue.where) for issue in reported}
    counted = {os.path.abspath(issue.where) for issue in reported if issue.kind == "unlisted-image"}
    loose = [
        path
        for path in present
        if os.path.realpath(path) not in known
        and not any(os.path.abspath(parent) in counted for parent in path.parents)
    ]
    labels = Labels(root, 0, None) if layout == "yolo" else None
    found = []
    for folder, paths in _by_folder(loose).items():
        texts = [file for path in paths if labels is not None and (file := labels.file_of(path)) is not None]
        objects = sum(map(object_lines, texts))
        found.append(
            DataIssue(
                "unlisted-image",
                str(folder),
                f"{len(paths)} images are in no split{f', with {objects} objects' if objects else ''}: {_names(paths)}",
                False,
                objects,
            )
        )
    if labels is not None:
        used = {os.path.realpath(file) for path in present if (file := labels.file_of(path)) is not None}
        texts = [path for path in files(root) if path.suffix.lower() == ".txt" and path.parent != root]
        alone = [path for path in texts if (real := os.path.realpath(path)) not in used and real not in known]
        for folder, paths in _by_folder(alone).items():
            objects = sum(map(object_lines, paths))
            if objects:
                found.append(
                    DataIssue(
                        "label-without-image",
                        str(folder),
                        f"{len(paths)} label files with {objects} "
                        f"objects belong to no image: {_names(paths)}; expected next to their "
                        "images, or in labels/ where the images are in images/",
                        True,
                        objects,
                    )
                )
    reported_links = {os.path.abspath(issue.where) for issue in reported}
    found += [
        DataIssue("broken-link", str(path), BROKEN_LINK, True)
        for path in broken
        if os.path.abspath(path) not in reported_links
    ]
    return found


def _by_folder(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    found = defaultdict(list)
    for path in paths:
        found[path.parent].append(path)
    return found


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
