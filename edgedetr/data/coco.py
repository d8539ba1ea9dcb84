"""COCO layout: annotations/<split>.json with images/<split>/ or images/; instances_<split>2017.json; Roboflow's
<split>/_annotations.coco.json beside the images; one JSON file (Label Studio, FiftyOne, labelme2coco) in the root.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgedetr.bundle import ClassInfo
from edgedetr.data import coco_boxes
from edgedetr.data.cleaning import RawImage, RawObject, RawSplit, as_number, numbers
from edgedetr.data.detection_set import Finding
from edgedetr.data.image_paths import Places
from edgedetr.data.images import is_image
from edgedetr.data.listing import child, children, files
from edgedetr.data.split_names import canonical
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_json

ROBOFLOW = "_annotations.coco.json"
IN_SPLIT = ("labels.json", "annotations.json")  # FiftyOne's train/labels.json with train/data/
SPLITS = ("train", "val", "test")
OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")
TABLES = ("images", "annotations", "categories")
LIMIT = 4 << 30  # bytes of one annotation file; COCO's own has 470 MB
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,38})")
NAMED = 8  # files that a finding about many of them names

Identity = int | str  # of an image or a category


def find(root: Path) -> dict[str, Path]:
    """Annotation file of each split; empty where this is no COCO layout."""
    found: dict[str, Path] = {}
    for file in _json_files(child(root, "annotations")):
        if not file.name.startswith(OTHER_TASKS):
            _put(found, canonical(file.stem.removeprefix("instances_")), file)
    entries = children(root)
    for folder in entries:
        if os.path.isfile(folder / ROBOFLOW):
            _put(found, canonical(folder.name), folder / ROBOFLOW)
    for file in _json_files(root):
        if canonical(file.stem.removeprefix("instances_")) in SPLITS:
            _put(found, canonical(file.stem.removeprefix("instances_")), file)
    if list(found) == ["default"]:  # CVAT's name for a set that has no splits
        return {"train": found["default"]}
    if not found:
        found = {
            canonical(folder.name): file
            for folder in entries
            if canonical(folder.name) in SPLITS
            for name in IN_SPLIT
            if os.path.isfile(file := folder / name) and is_coco(file)
        }
    if not found:
        fitting = [file for file in _json_files(root) if is_coco(file)]
        if len(fitting) == 1:
            return {"train": fitting[0]}
    return found


def _json_files(folder: Path | None) -> list[Path]:
    if folder is None or not os.path.isdir(folder):
        return []
    return [path for path in children(folder) if path.suffix.lower() == ".json" and os.path.isfile(path)]


def is_coco(file: Path) -> bool:
    try:
        _tables(file)
    except DataError:
        return False
    return True


def _put(found: dict[str, Path], split: str, file: Path) -> None:
    if split in found:
        raise DataError(
            f"both {found[split]} and {file} describe the split {split!r}; expected one; move the other away"
        )
    found[split] = file


def count(root: Path, split: str, source: Path) -> int:
    """Images listed in a split."""
    return len(_tables(source)["images"])


def read(root: Path, split: str, source: Path) -> RawSplit:
    """Read one annotation file; ids are the file's own where they are whole numbers of 64 bits, else counted from 1.

    Classes stand in the order of their ids.
    """
    tables = _tables(source)
    findings: list[Finding] = []
    classes, index = _classes(tables["categories"], source, findings)
    objects = Counter(identity(row.get("image_id")) for row in tables["annotations"] if isinstance(row, dict))
    own, places = _places(root, split, source)
    images, left_out, listed = _images(tables["images"], places, source, objects, findings)
    without = 0
    for row in tables["annotations"]:
        without += _annotate(row, images, index, left_out, source, findings)
    if without:
        findings.append(
            Finding(
                "box-from-segmentation",
                str(source),
                f"{without} annotations have no usable bbox; the box around their polygon or mask was taken",
            )
        )
    coco_boxes.drop_corners(list(images.values()), findings)
    findings += _unlisted(own, listed)
    findings += _empty_parents(tables["categories"], classes, images, source)
    return RawSplit(classes, list(images.values()), findings, listed=len(tables["images"]))


def identity(value: object) -> Identity | None:
    """An id as a key: 7, 7.0 and "7" are one; any other text stands for itself; None for what is no id."""
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


def _tables(source: Path) -> dict[str, list]:  # type: ignore[type-arg]  # rows are checked one by one below
    if os.path.isfile(source) and source.stat().st_size == 0:
        raise DataError(f"{source}: empty; expected COCO annotations; restore the file")
    raw = read_json(source, DataError, limit=LIMIT, fix="expected COCO annotations; restore the file")
    if not isinstance(raw, dict) or any(not isinstance(raw.get(key), list) for key in TABLES):
        found = sorted(map(str, raw))[:8] if isinstance(raw, dict) else type(raw).__name__
        raise DataError(f"{source}: holds {str(found)[:200]}; expected an object with the lists {', '.join(TABLES)}")
    return {key: raw[key] for key in TABLES}


def _classes(
    rows: Sequence[object], source: Path, findings: list[Finding]
) -> tuple[tuple[ClassInfo, ...], dict[Identity, int]]:
    """The classes, and the index of each by its id in the file."""
    pairs: dict[Identity, str] = {}
    for row in rows:
        key = identity(row.get("id")) if isinstance(row, dict) else None
        if key is None or not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise DataError(f"{source}: category {str(row)[:80]}; expected a whole number 'id' and a text 'name'")
        if pairs.setdefault(key, row["name"]) != row["name"]:
            raise DataError(
                f"{source}: category ids {[str(k)[:40] for k in pairs][:20]}, of which {str(key)[:40]} is "
                "of two names; expected each once"
            )
    if not pairs:
        raise DataError(f"{source}: category ids []; expected at least one, each once")
    if _in_64_bits(list(pairs)):
        order = sorted(pairs.items(), key=lambda pair: pair[0])  # type: ignore[arg-type,return-value]  # all are int
        classes = tuple(ClassInfo(n, int(key), name) for n, (key, name) in enumerate(order))
    else:
        order = list(pairs.items())
        classes = tuple(ClassInfo(n, n + 1, name) for n, (_, name) in enumerate(order))
        findings.append(
            Finding(
                "renumbered-class-ids",
                str(source),
                f"category ids like {str(order[0][0])[:40]!r} are no whole numbers of 64 bits; they count from 1 here",
            )
        )
    return classes, {key: n for n, (key, _) in enumerate(order)}


def _places(root: Path, split: str, source: Path) -> tuple[list[Path], Places]:
    """Folders that are this split's alone, and everywhere that its images may lie."""
    if source.name in (ROBOFLOW, *IN_SPLIT) and source.parent != root:
        inner = [path for name in ("data", "images") if (path := child(source.parent, name)) is not None]
        return [source.parent], Places(root, [*inner, source.parent])
    raw = source.stem.removeprefix("instances_")
    names = [raw, split] + (["valid", "validation"] if split == "val" else [])
    found = []
    pictures = child(root, "images")
    for parent in (pictures, root):
        found += [child(parent, name) for name in names] if parent is not None and os.path.isdir(parent) else []
    own = list(dict.fromkeys(place for place in found if place is not None and os.path.isdir(place)))
    shared = [place for place in (pictures, root) if place is not None and os.path.isdir(place)]
    loose = [path for name in ("data", "JPEGImages") if (path := child(root, name)) is not None and os.path.isdir(path)]
    return own, Places(root, list(dict.fromkeys([*own, *shared, *loose])))


def _images(
    rows: Sequence[object], places: Places, source: Path, objects: Counter[Identity | None], findings: list[Finding]
) -> tuple[dict[Identity, RawImage], set[Identity | None], set[str]]:
    """Images by their id in the file, the ids of those that are left out, and every path that is named."""
    listed: set[str] = set()
    found: dict[Identity, RawImage] = {}
    left_out: set[Identity | None] = set()
    names: dict[Identity, list[str]] = {}
    for row in rows:
        key = identity(row.get("id")) if isinstance(row, dict) else None
        if key is None or not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            findings.append(
                Finding(
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
        path = places.find(row["file_name"])
        if path is None:
            findings.append(
                Finding(
                    "path-outside",
                    str(source),
                    f"file_name {row['file_name'][:200]!r} leaves the data"
                    " directory; write it as it stands there, as in train/a.jpg",
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
            findings.append(
                Finding("no-size", str(path), "no usable width and height in the annotations; the file's are taken")
            )
        found[key] = RawImage(0, path, stated)
    for key, of in names.items():
        if len(set(of)) == 1:
            continue
        found.pop(key, None)
        left_out.add(key)
        for number, name in enumerate(dict.fromkeys(of)):
            findings.append(
                Finding(
                    "duplicate-image-id",
                    name[:200],
                    f"image id {str(key)[:40]} is that of "
                    f"{len(set(of))} images, and nothing says whose its {objects[key]} objects are; "
                    "give every image an id of its own",
                    True,
                    objects[key] if number == 0 else 0,
                )
            )
    _number(found)
    twice = [path for path, times in Counter(image.path for image in found.values()).items() if times > 1]
    findings += [
        Finding(
            "image-listed-twice",
            str(path),
            "listed under several ids, each with objects of its own; expected one entry with all of them",
        )
        for path in twice
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
    findings: list[Finding],
) -> int:
    """Add one object; 1 where its box had to be taken from its segmentation."""
    if not isinstance(row, dict):
        findings.append(Finding("bad-box", str(source), f"annotation {str(row)[:80]}; expected an object", True, 1))
        return 0
    key, category = identity(row.get("image_id")), identity(row.get("category_id"))
    image = images.get(key) if key is not None else None
    shown = str(row.get("id"))[:40]
    if image is None:
        if key is None or key not in left_out:
            findings.append(
                Finding(
                    "unknown-image",
                    str(source),
                    f"annotation {shown} is of image {str(row.get('image_id'))[:80]!r}, which is not listed",
                    True,
                    1,
                )
            )
        return 0
    where = str(image.path)
    label = index.get(category) if category is not None else None
    corner = _numbers(row.get("bbox"), 4)
    if label is None:
        findings.append(
            Finding(
                "unknown-class",
                where,
                f"annotation {shown} has category_id "
                f"{str(row.get('category_id'))[:80]!r}; known are {[str(k)[:40] for k in index][:20]}",
                True,
                1,
            )
        )
        return 0
    around = coco_boxes.around(row.get("segmentation")) if coco_boxes.is_empty(corner) else None
    area = _numbers([row.get("area")], 1)
    size = area[0] if area is not None and area[0] > 0 else None
    crowd = identity(row.get("iscrowd")) == 1 or row.get("iscrowd") is True
    if around is not None:
        image.objects.append(RawObject(label, around, crowd=crowd, area=size))
        return 1
    if corner is None:
        findings.append(
            Finding(
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
    image.objects.append(RawObject(label, (x, y, x + w, y + h), crowd=crowd, area=size))
    return 0


def _unlisted(own: list[Path], listed: set[str]) -> list[Finding]:
    """One note for each folder of the split that holds images which the annotations do not list."""
    notes = []
    for folder in own:
        beside = [path for path in files(folder) if is_image(path) and os.path.abspath(path) not in listed]
        if beside:
            notes.append(
                Finding(
                    "unlisted-image",
                    str(folder),
                    f"{len(beside)} images are not in the annotations: "
                    f"{', '.join(path.name for path in beside[:NAMED])}"
                    f"{', ...' if len(beside) > NAMED else ''}",
                )
            )
    return notes


def _empty_parents(
    rows: Sequence[object], classes: tuple[ClassInfo, ...], images: dict[Identity, RawImage], source: Path
) -> list[Finding]:
    """Roboflow writes the project's name as a class that others have as their supercategory and no object has."""
    used = {thing.label for image in images.values() for thing in image.objects}
    parents = {
        row.get("supercategory")
        for row in rows
        if isinstance(row, dict)
        and isinstance(row.get("supercategory"), str)
        and row.get("supercategory") != row.get("name")
    }
    counts = Counter(info.name for info in classes)
    return [
        Finding(
            "empty-parent-class",
            str(source),
            f"the class {info.name!r} (id {info.category_id}) has no object "
            "and is the parent or the namesake of another; the model would learn to detect it: leave it out "
            "with --set data.drop_empty_classes=true",
        )
        for info in classes
        if info.index not in used and (info.name in parents or counts[info.name] > 1)
    ]
