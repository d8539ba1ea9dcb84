"""Load a detection set from a folder in COCO, YOLO or VOC layout, which is detected from its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edgedetr.bundle import ClassInfo
from edgedetr.data import coco, voc, yolo
from edgedetr.data.cleaning import clean
from edgedetr.data.detection_set import DetectionSet, match_classes
from edgedetr.data.images import is_image
from edgedetr.data.listing import children
from edgedetr.errors import DataError, did_you_mean

Layout = Literal["coco", "yolo", "voc"]
# Each reader: find(root) -> {split: source}, count(root, split, source) -> int, read(root, split, source) -> RawSplit.
READERS: dict[str, Any] = {"coco": coco, "yolo": yolo, "voc": voc}


class NoLayout(DataError):
    """A folder without annotations of a known layout: perhaps a plain folder of images."""


FEW = 20  # sub-folders in which a data set is searched
EXPECTED = (
    "expected one of: COCO (annotations/train.json and images/train/), YOLO (data.yaml, or images/train/ and "
    "labels/train/), VOC (Annotations/ and JPEGImages/)"
)


def detect(path: str | Path) -> str:
    """ "coco", "yolo" or "voc". Errors: NoLayout where none fits, DataError where several do."""
    root = _root(path)
    fitting = [name for name, reader in READERS.items() if reader.find(root)]
    if not fitting:
        raise NoLayout(f"{root}: no annotations of a known layout; {EXPECTED}{_deeper(root)}")
    if len(fitting) > 1:
        raise DataError(
            f"{root}: has annotations of {' and '.join(fitting)}; expected one layout; "
            "move the other's annotations away"
        )
    return fitting[0]


def splits(path: str | Path, *, layout: Layout | None = None) -> dict[str, int]:
    """Images listed in each split, train, val and test first."""
    root = _root(path)
    reader = READERS[_layout(root, layout)]
    found = reader.find(root)
    usual = [name for name in ("train", "val", "test") if name in found]
    order = usual + sorted(name for name in found if name not in usual)
    return {name: reader.count(root, name, found[name]) for name in order}


def load(
    path: str | Path,
    split: str,
    *,
    strict: bool = False,
    layout: Layout | None = None,
    classes: Sequence[ClassInfo] | None = None,
    owner: str = "the model",
) -> DetectionSet:
    """One split of the set in `path`.

    split    "train", "val", "test", or another name that the set itself uses
    strict   DataError for anything that would be left out (see cleaning.py)
    layout   "coco", "yolo" or "voc"; None = detected from the files
    classes  classes that the set gets, matched by name; None = its own
    owner    who has `classes`, for messages
    """
    root = _root(path)
    reader = READERS[_layout(root, layout)]
    found = reader.find(root)
    if split not in found:
        raise DataError(
            f"{root}: no split {split!r}; this set has {', '.join(sorted(found)) or 'none'}{did_you_mean(split, found)}"
        )
    loaded = clean(reader.read(root, split, found[split]), name=split, root=root, strict=strict)
    return loaded if classes is None else match_classes(loaded, classes, owner)


def folder_of(path: str | Path) -> Path:
    """The folder of a data set that is named by its data.yaml; any other path unchanged.

    Errors: DataError where the folder is read by another YAML file.
    """
    path = Path(path)
    if path.suffix.lower() not in yolo.CONFIGURATIONS or not os.path.isfile(path):
        return path
    used = yolo.describing_file(path.parent)
    if used is None or used.name != path.name:
        which = f"is read by its {used.name}" if used is not None else "has several such files, or none with names"
        raise DataError(
            f"{path}: the folder {path.parent} {which}; expected one file with names and splits in the folder of the "
            "images; call it data.yaml"
        )
    return path.parent


def _deeper(root: Path) -> str:
    """A hint for the message: a data set one or two folders below (pets/pets, VOCdevkit/VOC2012), or loose files."""
    if any("\\" in path.name for path in children(root)):
        return (
            "; file names contain backslashes, because an archive made on Windows was unpacked elsewhere: "
            "unpack it with a program that makes folders of them"
        )
    several = [path.name for path in children(root) if path.suffix.lower() == ".json" and coco.is_coco(path)]
    if len(several) > 1:
        return f"; {', '.join(several[:8])} are COCO files: call them train.json, val.json and test.json"
    stems = {path.stem for path in children(root) if is_image(path)}
    if any(path.suffix.lower() == ".txt" and path.stem in stems for path in children(root)):
        return "; label files are next to the images: put classes.txt next to them, with one class name per line"
    near = [folder for folder in children(root) if os.path.isdir(folder)][:FEW]
    for folder in [*near, *(inner for one in near for inner in children(one)[:FEW] if os.path.isdir(inner))]:
        try:
            if any(reader.find(folder) for reader in READERS.values()):
                return f"; perhaps you mean {folder}"
        except DataError:
            continue
    return ""


def _root(path: str | Path) -> Path:
    root = folder_of(path)
    if os.path.isfile(root):
        raise DataError(f"{root}: a file; expected the directory of a data set or its data.yaml, perhaps {root.parent}")
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such directory; {EXPECTED}")
    if not children(root):
        raise NoLayout(f"{root}: an empty directory; {EXPECTED}")
    return root


def _layout(root: Path, layout: str | None) -> str:
    if layout is None:
        return detect(root)
    if layout not in READERS:
        raise DataError(f"layout {layout!r}; expected one of {', '.join(READERS)}{did_you_mean(layout, READERS)}")
    return layout
