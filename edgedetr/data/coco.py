"""COCO layout: annotations/<split>.json with images/<split>/ or images/; instances_<split>2017.json; Roboflow's
<split>/_annotations.coco.json beside the images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgedetr.bundle import ClassInfo
from edgedetr.data.clean import RawImage, RawObject, RawSplit, inside, numbers
from edgedetr.data.form import Finding
from edgedetr.data.names import canonical
from edgedetr.errors import DataError

ROBOFLOW = "_annotations.coco.json"
OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")


def find(root: Path) -> dict[str, Path]:
    """Annotation file of each split; empty where this is no COCO layout."""
    found: dict[str, Path] = {}
    for file in sorted(root.glob("annotations/*.json")):
        if not file.name.startswith(OTHER_TASKS):
            _put(found, canonical(file.stem.removeprefix("instances_")), file)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if (folder / ROBOFLOW).is_file():
            _put(found, canonical(folder.name), folder / ROBOFLOW)
    for file in sorted(root.glob("*.json")):
        if canonical(file.stem.removeprefix("instances_")) in ("train", "val", "test"):
            _put(found, canonical(file.stem.removeprefix("instances_")), file)
    return found


def _put(found: dict[str, Path], split: str, file: Path) -> None:
    if split in found:
        raise DataError(f"both {found[split]} and {file} describe the split {split!r}; expected one; "
                        "move the other away")
    found[split] = file


def count(root: Path, split: str, source: Path) -> int:
    """Images listed in a split."""
    return len(_tables(source)["images"])


def read(root: Path, split: str, source: Path) -> RawSplit:
    """Read one annotation file; ids are the file's own, classes stand in the order of their ids."""
    tables = _tables(source)
    findings: list[Finding] = []
    classes = _classes(tables["categories"], source)
    index = {info.category_id: info.index for info in classes}
    folders = _folders(root, split, source)
    images: dict[int, RawImage] = {}
    repeated: list[RawImage] = []
    left_out: set[object] = set()
    for row in tables["images"]:
        image = _image(row, folders, source, findings)
        if image is None:
            left_out.add(_hashable(row.get("id")) if isinstance(row, dict) else None)
        elif image.image_id in images:
            repeated.append(image)
        else:
            images[image.image_id] = image
    for row in tables["annotations"]:
        _annotate(row, images, index, left_out, source, findings)
    return RawSplit(classes, list(images.values()) + repeated, findings)


def _tables(source: Path) -> dict[str, list]:  # type: ignore[type-arg]  # rows are checked one by one below
    try:
        raw = json.loads(source.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        state = "empty" if source.stat().st_size == 0 else f"no whole JSON ({error})"
        raise DataError(f"{source}: {state}; expected COCO annotations; restore the file") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(raw, dict) or any(not isinstance(raw.get(key), list) for key in keys):
        found = sorted(map(str, raw))[:8] if isinstance(raw, dict) else type(raw).__name__
        raise DataError(f"{source}: holds {found}; expected an object with the lists {', '.join(keys)}")
    return {key: raw[key] for key in keys}


def _classes(rows: Sequence[object], source: Path) -> tuple[ClassInfo, ...]:
    pairs = []
    for row in rows:
        if not isinstance(row, dict) or not _whole(row.get("id")) or not isinstance(row.get("name"), str):
            raise DataError(f"{source}: category {str(row)[:80]}; expected a whole number 'id' and a text 'name'")
        pairs.append((int(row["id"]), row["name"]))
    pairs.sort()
    identities = [identity for identity, _ in pairs]
    if not pairs or len(set(identities)) != len(pairs):
        raise DataError(f"{source}: category ids {identities[:20]}; expected at least one, each once")
    return tuple(ClassInfo(index, identity, name) for index, (identity, name) in enumerate(pairs))


def _folders(root: Path, split: str, source: Path) -> list[Path]:
    if source.name == ROBOFLOW:
        return [source.parent]
    raw = source.stem.removeprefix("instances_")
    names = [raw, split] + (["valid"] if split == "val" else [])
    places = [root / "images" / name for name in names] + [root / "images"] + [root / name for name in names] + [root]
    return list(dict.fromkeys(place for place in places if place.is_dir()))


def _image(row: object, folders: list[Path], source: Path, findings: list[Finding]) -> RawImage | None:
    if not isinstance(row, dict) or not _whole(row.get("id")) or not isinstance(row.get("file_name"), str):
        findings.append(Finding("bad-image-entry", str(source),
                                f"image {str(row)[:80]}; expected a whole 'id' and a 'file_name'", True))
        return None
    places = [place for place in (inside(folder, row["file_name"]) for folder in folders) if place is not None]
    if not places:
        findings.append(Finding("path-outside", str(source),
                                f"file_name {row['file_name']!r} leaves the data directory", True))
        return None
    path = next((place for place in places if place.is_file()), places[0])
    size = numbers((row.get("height"), row.get("width")), 2)
    stated = (int(size[0]), int(size[1])) if size is not None and min(size) > 0 else None
    if stated is None:
        findings.append(Finding("no-size", str(path),
                                "no usable width and height in the annotations; the file's are taken"))
    return RawImage(row["id"], path, stated)


def _annotate(row: object, images: dict[int, RawImage], index: dict[int, int], left_out: set[object],
              source: Path, findings: list[Finding]) -> None:
    if not isinstance(row, dict):
        findings.append(Finding("bad-box", str(source), f"annotation {str(row)[:80]}; expected an object", True))
        return
    image = images.get(row["image_id"]) if _whole(row.get("image_id")) else None
    if image is None:
        if _hashable(row.get("image_id")) not in left_out:
            findings.append(Finding("unknown-image", str(source),
                                    f"annotation {row.get('id')} is of image {row.get('image_id')!r}, "
                                    "which is not listed", True))
        return
    where = str(image.path)
    label = index.get(row["category_id"]) if _whole(row.get("category_id")) else None
    corner = numbers(row.get("bbox"), 4)
    if label is None:
        findings.append(Finding("unknown-class", where,
                                f"annotation {row.get('id')} has category_id {row.get('category_id')!r}; "
                                f"known are {sorted(index)[:20]}", True))
    elif corner is None:
        findings.append(Finding("bad-box", where,
                                f"annotation {row.get('id')} has bbox {str(row.get('bbox'))[:80]}; expected four "
                                "finite numbers x, y, width, height", True))
    else:
        x, y, w, h = corner
        area = numbers((row.get("area"),), 1)
        image.objects.append(RawObject(label, (x, y, x + w, y + h), crowd=row.get("iscrowd") in (1, True),
                                       area=area[0] if area is not None and area[0] > 0 else None))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _hashable(value: object) -> object:
    return value if isinstance(value, (int, str)) else str(value)
