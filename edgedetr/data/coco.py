"""COCO layout: annotations/<split>.json with images/<split>/ or images/; instances_<split>2017.json; Roboflow's
<split>/_annotations.coco.json unlisted the images; one JSON file (Label Studio, FiftyOne, labelme2coco) in the root.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgedetr.bundle import ClassInfo
from edgedetr.data import coco_boxes
from edgedetr.data.cleaning import RawImage, RawObject, RawSplit, as_number, numbers, turn
from edgedetr.data.coco_files import IN_SPLIT, INSTANCES, KEYPOINTS, ROBOFLOW, find, is_coco, read_tables
from edgedetr.data.detection_set import DataIssue
from edgedetr.data.image_paths import PathResolver
from edgedetr.data.images import is_image
from edgedetr.data.listing import child, files
from edgedetr.errors import DataError

__all__ = ["count", "find", "identity", "is_coco", "read"]
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,38})")
NAMED = 8  # files that one issue lists by name

Identity = int | str  # of an image or a category


def count(root: Path, split: str, source: Path) -> int:
    """Images listed in a split."""
    return len(read_tables(source)["images"])


def read(root: Path, split: str, source: Path) -> RawSplit:
    """Read one annotation file; ids are those of the file if they are integers of 64 bits, else they count from 1.

    Classes are in the order of their ids.
    """
    tables = read_tables(source)
    issues: list[DataIssue] = []
    classes, index = _classes(tables["categories"], source, issues)
    objects = Counter(identity(row.get("image_id")) for row in tables["annotations"] if isinstance(row, dict))
    own, paths = _image_paths(root, split, source)
    images, left_out, listed = _images(tables["images"], paths, source, objects, issues)
    from_segmentation = 0
    for row in tables["annotations"]:
        from_segmentation += _annotate(row, images, index, left_out, source, issues)
    if from_segmentation:
        issues.append(
            DataIssue(
                "box-from-segmentation",
                str(source),
                f"{from_segmentation} annotations have no usable bbox; the box of their polygon or mask is used",
            )
        )
    coco_boxes.drop_corners(list(images.values()), issues)
    issues += _unlisted(own, listed)
    issues += _empty_parents(tables["categories"], classes, images, source)
    return RawSplit(classes, list(images.values()), issues, listed=len(tables["images"]))


def identity(value: object) -> Identity | None:
    """An id as a key: 7, 7.0 and "7" are equal; any other text is its own key; None for values that are no id."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and 0 < len(text := value.strip()) <= 200:
        return int(text) if WHOLE.fullmatch(text) else text
    return None


def _numbers(values: object, count: int) -> tuple[float, ...] | None:
    return numbers([as_number(value) for value in values] if isinstance(values, list) else values, count)


def _in_64_bits(keys: Sequence[Identity]) -> bool:
    return all(isinstance(key, int) and -(2**63) <= key < 2**63 for key in keys)


def _classes(
    rows: Sequence[object], source: Path, issues: list[DataIssue]
) -> tuple[tuple[ClassInfo, ...], dict[Identity, int]]:
    """The classes, and the index of each by its id in the file."""
    pairs: dict[Identity, str] = {}
    for row in rows:
        key = identity(row.get("id")) if isinstance(row, dict) else None
        if key is None or not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise DataError(f"{source}: category {str(row)[:80]}; expected a whole number 'id' and a text 'name'")
        if pairs.setdefault(key, row["name"]) != row["name"]:
            raise DataError(
                f"{source}: category ids {[str(k)[:40] for k in pairs][:20]}, of which {str(key)[:40]} has "
                "two names; expected each once"
            )
    if not pairs:
        raise DataError(f"{source}: category ids []; expected at least one, each once")
    if _in_64_bits(list(pairs)):
        order = sorted(pairs.items(), key=lambda pair: int(pair[0]))
        classes = tuple(ClassInfo(n, int(key), name) for n, (key, name) in enumerate(order))
    else:
        order = list(pairs.items())
        classes = tuple(ClassInfo(n, n + 1, name) for n, (_, name) in enumerate(order))
        issues.append(
            DataIssue(
                "renumbered-class-ids",
                str(source),
                f"category ids like {str(order[0][0])[:40]!r} are not integers of 64 bits; they count from 1 here",
            )
        )
    return classes, {key: n for n, (key, _) in enumerate(order)}


def _image_paths(root: Path, split: str, source: Path) -> tuple[list[Path], PathResolver]:
    """The folders of this split alone, and a resolver over all folders that may contain its images."""
    if source.name in (ROBOFLOW, *IN_SPLIT) and source.parent != root:
        inner = [path for name in ("data", "images") if (path := child(source.parent, name)) is not None]
        return [source.parent], PathResolver(root, [*inner, source.parent])
    raw = source.stem.removeprefix(INSTANCES).removeprefix(KEYPOINTS)
    names = [raw, split] + (["valid", "validation"] if split == "val" else [])
    found = []
    image_folder = child(root, "images")
    for parent in (image_folder, root):
        found += [child(parent, name) for name in names] if parent is not None and os.path.isdir(parent) else []
    own = list(dict.fromkeys(folder for folder in found if folder is not None and os.path.isdir(folder)))
    shared = [folder for folder in (image_folder, root) if folder is not None and os.path.isdir(folder)]
    loose = [path for name in ("data", "JPEGImages") if (path := child(root, name)) is not None and os.path.isdir(path)]
    return own, PathResolver(root, list(dict.fromkeys([*own, *shared, *loose])))


def _images(
    rows: Sequence[object],
    paths: PathResolver,
    source: Path,
    objects: Counter[Identity | None],
    issues: list[DataIssue],
) -> tuple[dict[Identity, RawImage], set[Identity | None], set[str]]:
    """Images by their id in the file, the ids of those that are left out, and every listed path."""
    listed: set[str] = set()
    found: dict[Identity, RawImage] = {}
    left_out: set[Identity | None] = set()
    names: dict[Identity, list[str]] = {}
    for row in rows:
        key = identity(row.get("id")) if isinstance(row, dict) else None
        if key is None or not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            issues.append(
                DataIssue(
                    "bad-image-entry",
                    str(source),
                    f"image {str(row)[:80]}; expected a whole 'id' and a 'file_name'",
                    True,
                    objects[key] if key is not None and key not in names else 0,
                )
            )
            left_out.add(key)
            continue
        names.setdefault(key, []).append(row["file_name"])
        path = paths.find(row["file_name"])
        if path is None:
            issues.append(
                DataIssue(
                    "path-outside",
                    str(source),
                    f"file_name {row['file_name'][:200]!r} leaves the data"
                    " directory; write the path inside it, as in train/a.jpg",
                    True,
                    objects[key],
                )
            )
            left_out.add(key)
            continue
        listed.add(os.path.abspath(path))
        size = _numbers([row.get("height"), row.get("width")], 2)
        stated = (int(size[0]), int(size[1])) if size is not None and min(size) > 0 else None
        if stated is None:
            issues.append(
                DataIssue("no-size", str(path), "no usable width and height in the annotations; the file's are used")
            )
        found[key] = RawImage(0, path, stated)
    for key, of in names.items():
        if len(set(of)) == 1:
            continue
        found.pop(key, None)
        left_out.add(key)
        for number, name in enumerate(dict.fromkeys(of)):
            issues.append(
                DataIssue(
                    "duplicate-image-id",
                    name[:200],
                    f"image id {str(key)[:40]} is shared by "
                    f"{len(set(of))} images, so its {objects[key]} objects cannot be assigned; "
                    "give every image its own id",
                    True,
                    objects[key] if number == 0 else 0,
                )
            )
    _number(found)
    repeated = [path for path, times in Counter(image.path for image in found.values()).items() if times > 1]
    issues += [
        DataIssue(
            "image-listed-twice",
            str(path),
            "listed under several ids with separate objects; expected one entry with all of them",
        )
        for path in repeated
    ]
    return found, left_out, listed


def _number(found: dict[Identity, RawImage]) -> None:
    keep = _in_64_bits(list(found))
    for position, (key, image) in enumerate(found.items(), start=1):
        image.image_id = int(key) if keep else position
        image.original_id = None if keep else key


def _annotate(
    row: object,
    images: dict[Identity, RawImage],
    index: dict[Identity, int],
    left_out: set[Identity | None],
    source: Path,
    issues: list[DataIssue],
) -> int:
    """Add one object; returns 1 where its box was computed from its segmentation, else 0."""
    if not isinstance(row, dict):
        issues.append(DataIssue("bad-box", str(source), f"annotation {str(row)[:80]}; expected an object", True, 1))
        return 0
    key, category = identity(row.get("image_id")), identity(row.get("category_id"))
    image = images.get(key) if key is not None else None
    shown = str(row.get("id"))[:40]
    if image is None:
        if key is None or key not in left_out:
            issues.append(
                DataIssue(
                    "unknown-image",
                    str(source),
                    f"annotation {shown} belongs to image {str(row.get('image_id'))[:80]!r}, which is not listed",
                    True,
                    1,
                )
            )
        return 0
    where = str(image.path)
    label = index.get(category) if category is not None else None
    corner = _numbers(row.get("bbox"), 4)
    if label is None:
        issues.append(
            DataIssue(
                "unknown-class",
                where,
                f"annotation {shown} has category_id "
                f"{str(row.get('category_id'))[:80]!r}; known are {[str(k)[:40] for k in index][:20]}",
                True,
                1,
            )
        )
        return 0
    segmentation = coco_boxes.segmentation_box(row.get("segmentation")) if coco_boxes.is_empty(corner) else None
    area = _numbers([row.get("area")], 1)
    size = area[0] if area is not None and area[0] > 0 else None
    crowd = identity(row.get("iscrowd")) == 1 or row.get("iscrowd") is True
    if segmentation is not None:
        image.objects.append(RawObject(label, segmentation, crowd=crowd, area=size))
        return 1
    if corner is None:
        issues.append(
            DataIssue(
                "bad-box",
                where,
                f"annotation {shown} has bbox {str(row.get('bbox'))[:80]}; expected "
                "four finite numbers x, y, width, height",
                True,
                1,
            )
        )
        return 0
    x, y, w, h = corner
    attributes = row.get("attributes")  # CVAT: the box before it is turned, and the angle
    degrees = turn(attributes.get("rotation")) if isinstance(attributes, dict) else 0.0
    image.objects.append(RawObject(label, (x, y, x + w, y + h), crowd=crowd, area=size, degrees=degrees))
    return 0


def _unlisted(own: list[Path], listed: set[str]) -> list[DataIssue]:
    """One issue for each folder of the split with images that the annotations do not list."""
    notes = []
    for folder in own:
        unlisted = [path for path in files(folder) if is_image(path) and os.path.abspath(path) not in listed]
        if unlisted:
            notes.append(
                DataIssue(
                    "unlisted-image",
                    str(folder),
                    f"{len(unlisted)} images are not in the annotations: "
                    f"{', '.join(path.name for path in unlisted[:NAMED])}"
                    f"{', ...' if len(unlisted) > NAMED else ''}",
                )
            )
    return notes


def _empty_parents(
    rows: Sequence[object], classes: tuple[ClassInfo, ...], images: dict[Identity, RawImage], source: Path
) -> list[DataIssue]:
    """Roboflow writes the project's name as a class without objects, the supercategory of the other classes."""
    used = {item.label for image in images.values() for item in image.objects}
    parents = {
        row.get("supercategory")
        for row in rows
        if isinstance(row, dict)
        and isinstance(row.get("supercategory"), str)
        and row.get("supercategory") != row.get("name")
    }
    counts = Counter(info.name for info in classes)
    return [
        DataIssue(
            "empty-parent-class",
            str(source),
            f"the class {info.name!r} (id {info.category_id}) has no object "
            "and is the supercategory or the namesake of another; the model would get an unused class: leave it "
            "out with --set data.drop_empty_classes=true",
        )
        for info in classes
        if info.index not in used and (info.name in parents or counts[info.name] > 1)
    ]
