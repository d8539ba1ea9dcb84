"""Find COCO's annotation files in a folder, and read their three tables."""

from __future__ import annotations

import os
from pathlib import Path

from edgedetr.data.detection_set import canonical_split_name
from edgedetr.data.listing import child, children
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_json

ROBOFLOW = "_annotations.coco.json"
IN_SPLIT = ("labels.json", "annotations.json")  # FiftyOne's train/labels.json with train/data/
SPLITS = ("train", "val", "test")
INSTANCES, KEYPOINTS = "instances_", "person_keypoints_"  # the latter are read where there are no instances
OTHER_TASKS = ("captions_", KEYPOINTS, "image_info_", "stuff_", "panoptic_")
TABLES = ("images", "annotations", "categories")
LIMIT = 4 << 30  # bytes of one annotation file; COCO's own has 470 MB


def find(root: Path) -> dict[str, Path]:
    """Annotation file of each split; empty where this is not a COCO layout."""
    found: dict[str, Path] = {}
    inside = _json_files(child(root, "annotations"))
    for file in inside:
        if not file.name.startswith(OTHER_TASKS):
            _put(found, split_of(file), file)
    for file in inside if not found else []:
        if file.name.startswith(KEYPOINTS):
            _put(found, split_of(file), file)
    for folder in children(root):
        if os.path.isfile(folder / ROBOFLOW):
            _put(found, canonical_split_name(folder.name), folder / ROBOFLOW)
    for file in _json_files(root):
        if split_of(file) in SPLITS and not file.name.startswith(OTHER_TASKS):
            _put(found, split_of(file), file)
    if list(found) == ["default"]:  # CVAT's name for a set that has no splits
        return {"train": found["default"]}
    return found or _in_splits(root) or _only_file(root)


def split_of(file: Path) -> str:
    """The split that a file's name stands for: instances_val2017.json -> val."""
    return canonical_split_name(file.stem.removeprefix(INSTANCES).removeprefix(KEYPOINTS))


def _in_splits(root: Path) -> dict[str, Path]:
    """FiftyOne's train/labels.json."""
    return {
        canonical_split_name(folder.name): file
        for folder in children(root)
        if canonical_split_name(folder.name) in SPLITS
        for name in IN_SPLIT
        if os.path.isfile(file := folder / name) and is_coco(file)
    }


def _only_file(root: Path) -> dict[str, Path]:
    """The one COCO file of the root, whatever its name, as the train split."""
    fitting = [file for file in _json_files(root) if is_coco(file)]
    return {"train": fitting[0]} if len(fitting) == 1 else {}


def _json_files(folder: Path | None) -> list[Path]:
    if folder is None or not os.path.isdir(folder):
        return []
    return [path for path in children(folder) if path.suffix.lower() == ".json" and os.path.isfile(path)]


def is_coco(file: Path) -> bool:
    try:
        read_tables(file)
    except DataError:
        return False
    return True


def _put(found: dict[str, Path], split: str, file: Path) -> None:
    if split in found:
        raise DataError(
            f"both {found[split]} and {file} describe the split {split!r}; expected one; move the other away"
        )
    found[split] = file


def read_tables(source: Path) -> dict[str, list[object]]:
    """The lists images, annotations and categories of a file. Errors: DataError where it has not all of them."""
    if os.path.isfile(source) and source.stat().st_size == 0:
        raise DataError(f"{source}: empty; expected COCO annotations; restore the file")
    raw = read_json(source, DataError, limit=LIMIT, fix="expected COCO annotations; restore the file")
    if not isinstance(raw, dict) or any(not isinstance(raw.get(key), list) for key in TABLES):
        found = sorted(map(str, raw))[:8] if isinstance(raw, dict) else type(raw).__name__
        raise DataError(f"{source}: holds {str(found)[:200]}; expected an object with the lists {', '.join(TABLES)}")
    return {key: raw[key] for key in TABLES}
