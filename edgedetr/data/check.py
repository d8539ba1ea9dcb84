"""What a data set holds and what is odd in it: splits, classes, box sizes, unreadable files, copies and near-copies."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from edgedetr.data import images, layouts, near_duplicates
from edgedetr.data.cleaning import UnusableSplit, summary
from edgedetr.data.detection_set import DataIssue, DetectionSet, Sample, display_names, match_classes
from edgedetr.data.unlisted_files import leftovers
from edgedetr.errors import DataError

SMALL, MEDIUM = 32.0**2, 96.0**2  # COCO's borders between small, medium and large, pixels^2 of the source image
IMBALANCE = 10.0  # times more objects of the most frequent class than of the rarest: worth a word
SHOWN = 20  # issues of one kind that `lines` spells out; JSON has them all


@dataclass(frozen=True)
class SplitReport:
    """One split after the unusable was left out."""

    name: str
    listed: int  # images in the annotations
    images: int  # of them usable
    without_objects: int
    objects: int
    crowd: int
    per_class: dict[str, int]
    small: int  # objects by COCO's area classes
    medium: int
    large: int
    objects_per_image: tuple[int, float, int]  # least, median, most
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
        """How many items were left out."""
        return sum(issue.fatal for issue in self.issues)

    @property
    def objects_left_out(self) -> int:
        """How many annotated objects were left out, alone or with their image."""
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
                f"{split.objects} objects, {least} / {median:g} / {most} an image (least / median / most)"
            )
            share = 100 / max(split.objects, 1)
            text.append(
                f"  sizes: {split.small * share:.0f} % small, {split.medium * share:.0f} % medium, "
                f"{split.large * share:.0f} % large (below 32, below 96 px, above; COCO)"
            )
            text.append("  classes: " + ", ".join(f"{name} {count}" for name, count in split.per_class.items()))
            pictures = list(split.sizes.items())[:5]
            text.append("  images: " + ", ".join(f"{size} ({count})" for size, count in pictures))
        text.append(f"issues: {summary(self.issues) or 'none'}")
        if self.fatal:
            text.append(f"left out: {self.fatal} items, with them or alone {self.objects_left_out} objects")
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

    progress   called with (images looked at, images in all)
    Errors: DataError where `path` is no data set or an annotation file is damaged; anything less becomes a issue.
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
            known = False  # which images are this split's is not known
            issues.append(DataIssue("unusable-split", name, str(error), True))
    done, total = 0, sum(len(found) for found in sets)
    digests: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    hashes: dict[str, list[tuple[Sample, np.ndarray | None]]] = {}
    reports = []
    for found in sets:
        issues += found.issues
        hashes[found.name] = []
        for sample in found.samples:
            try:
                with images.open_plain(sample.path) as stream:
                    content = stream.read()
                hashes[found.name].append((sample, near_duplicates.fingerprint(images.decode(sample.path))))
                digests[hashlib.sha256(content).hexdigest()].append((found.name, sample.path))
            except (DataError, OSError) as error:
                issues.append(DataIssue("unreadable-image", str(sample.path), str(error), True, len(sample.boxes)))
            done += 1
            if progress is not None:
                progress(done, total)
        whole = tuple(sample for sample, _ in hashes[found.name])
        if whole:
            reports.append(_report(replace(found, samples=whole), listed[found.name]))
        else:
            issues.append(DataIssue("unusable-split", found.name, "no image of it can be decoded", True))
    if known:
        listing = [sample.path for found in sets for sample in found.samples]
        try:
            issues += leftovers(root, kind, listing, issues)
        except DataError as error:  # a folder of somebody else's in the root
            issues.append(DataIssue("unreadable-folder", str(root), f"{error}; what lies there was not looked at"))
    issues += _duplicates(digests)
    same = {frozenset(path for _, path in places) for places in digests.values() if len(places) > 1}
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


def _near_copies(
    hashes: dict[str, list[tuple[Sample, np.ndarray | None]]], same: set[frozenset[Path]]
) -> list[DataIssue]:
    """Notes on images of a later split that nearly copy one of an earlier; `same` holds files of equal bytes."""
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
                        f"shows nearly the same as "
                        f"{one[a].path} of {first} ({bits} of {near_duplicates.BITS} bits differ); a score on "
                        f"{second} counts an image that was all but seen before",
                    )
                )
    return issues


def _duplicates(digests: dict[str, list[tuple[str, Path]]]) -> list[DataIssue]:
    issues = []
    for places in digests.values():
        # VOC's trainval holds train and val by design.
        apart = [(split, path) for split, path in places if split != "trainval"]
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
