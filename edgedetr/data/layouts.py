"""Load a detection set from a folder: COCO, YOLO or VOC layout, recognized by what lies in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edgedetr.bundle import ClassInfo
from edgedetr.data import coco, voc, yolo
from edgedetr.data.cleaning import finish
from edgedetr.data.detection_set import DetectionSet, matched
from edgedetr.data.images import is_image
from edgedetr.data.listing import children
from edgedetr.errors import DataError, did_you_mean

Layout = Literal["coco", "yolo", "voc"]
# Each reader: find(root) -> {split: source}, count(root, split, source) -> int, read(root, split, source) -> RawSplit.
READERS: dict[str, Any] = {"coco": coco, "yolo": yolo, "voc": voc}

FEW = 20  # folders that are looked into for a set
EXPECTED = (
    "expected one of: COCO (annotations/train.json and images/train/), YOLO (data.yaml, or images/train/ and "
    "labels/train/), VOC (Annotations/ and JPEGImages/)"
)


def detect(path: str | Path) -> str:
    """ "coco", "yolo" or "voc"; DataError where none or several fit."""
    root = _root(path)
    fitting = [name for name, reader in READERS.items() if reader.find(root)]
    if len(fitting) != 1:
        what = (
            f"looks like {' and '.join(fitting)} at once; expected one layout; move the other's annotations away"
            if fitting
            else f"no annotations of a known layout; {EXPECTED}{_deeper(root)}"
        )
        raise DataError(f"{root}: {what}")
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
    whose: str = "the model",
) -> DetectionSet:
    """One split of the set in `path`.

    split    "train", "val", "test", or another name that the set itself uses
    strict   DataError for anything that would be left out (clean.py says what)
    layout   "coco", "yolo" or "voc" where it should not be recognized from the files
    classes  those of `whose`: the set comes back with them, matched by name whatever its own ids and order are
    """
    root = _root(path)
    reader = READERS[_layout(root, layout)]
    found = reader.find(root)
    if split not in found:
        raise DataError(
            f"{root}: no split {split!r}; this set has {', '.join(sorted(found)) or 'none'}{did_you_mean(split, found)}"
        )
    loaded = finish(reader.read(root, split, found[split]), name=split, root=root, strict=strict)
    return loaded if classes is None else matched(loaded, classes, whose)


def _deeper(root: Path) -> str:
    """Where an unpacked archive hides the set one or two folders below (pets/pets, VOCdevkit/VOC2012), a word on it."""
    if any("\\" in path.name for path in children(root)):
        return (
            "; names of files hold backslashes, as an archive made on Windows and unpacked elsewhere leaves them: "
            "unpack it with a program that makes folders of them"
        )
    several = [path.name for path in children(root) if path.suffix.lower() == ".json" and coco.is_coco(path)]
    if len(several) > 1:
        return f"; {', '.join(several[:8])} are COCO files: call them train.json, val.json and test.json"
    stems = {path.stem for path in children(root) if is_image(path)}
    if any(path.suffix.lower() == ".txt" and path.stem in stems for path in children(root)):
        return "; label files lie beside the images: put classes.txt beside them, with the name of a class on each line"
    near = [folder for folder in children(root) if os.path.isdir(folder)][:FEW]
    for folder in [*near, *(inner for one in near for inner in children(one)[:FEW] if os.path.isdir(inner))]:
        try:
            if any(reader.find(folder) for reader in READERS.values()):
                return f"; perhaps you mean {folder}"
        except DataError:
            continue
    return ""


def _root(path: str | Path) -> Path:
    root = Path(path)
    if os.path.isfile(root):
        raise DataError(f"{root}: a file; expected the directory of a data set, perhaps {root.parent}")
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such directory; {EXPECTED}")
    if not children(root):
        raise DataError(f"{root}: an empty directory; {EXPECTED}")
    return root


def _layout(root: Path, layout: str | None) -> str:
    if layout is None:
        return detect(root)
    if layout not in READERS:
        raise DataError(f"layout {layout!r}; expected one of {', '.join(READERS)}{did_you_mean(layout, READERS)}")
    return layout
