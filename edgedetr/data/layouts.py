"""Load a detection set from a folder: COCO, YOLO or VOC layout, recognised by what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from edgedetr.data import coco, voc, yolo
from edgedetr.data.clean import finish
from edgedetr.data.form import DetectionSet
from edgedetr.errors import DataError, did_you_mean

Layout = Literal["coco", "yolo", "voc"]
# Each reader: find(root) -> {split: source}, count(root, split, source) -> int, read(root, split, source) -> RawSplit.
READERS: dict[str, Any] = {"coco": coco, "yolo": yolo, "voc": voc}

EXPECTED = ("expected one of: COCO (annotations/train.json and images/train/), YOLO (data.yaml, or images/train/ and "
            "labels/train/), VOC (Annotations/ and JPEGImages/)")


def detect(path: str | Path) -> str:
    """"coco", "yolo" or "voc"; DataError where none or several fit."""
    root = _root(path)
    fitting = [name for name, reader in READERS.items() if reader.find(root)]
    if len(fitting) != 1:
        what = f"looks like {' and '.join(fitting)} at once; expected one layout; move the other's annotations away" \
            if fitting else f"no annotations of a known layout; {EXPECTED}"
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


def load(path: str | Path, split: str, *, strict: bool = False, layout: Layout | None = None) -> DetectionSet:
    """One split of the set in `path`.

    split    "train", "val", "test", or another name that the set itself uses
    strict   DataError for anything that would be left out (clean.py says what)
    layout   "coco", "yolo" or "voc" where it should not be recognised from the files
    """
    root = _root(path)
    reader = READERS[_layout(root, layout)]
    found = reader.find(root)
    if split not in found:
        raise DataError(f"{root}: no split {split!r}; this set has {', '.join(sorted(found)) or 'none'}"
                        f"{did_you_mean(split, found)}")
    return finish(reader.read(root, split, found[split]), name=split, root=root, strict=strict)


def _root(path: str | Path) -> Path:
    root = Path(path)
    if root.is_file():
        raise DataError(f"{root}: a file; expected the directory of a data set, perhaps {root.parent}")
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; {EXPECTED}")
    if not any(root.iterdir()):
        raise DataError(f"{root}: an empty directory; {EXPECTED}")
    return root


def _layout(root: Path, layout: str | None) -> str:
    if layout is None:
        return detect(root)
    if layout not in READERS:
        raise DataError(f"layout {layout!r}; expected one of {', '.join(READERS)}{did_you_mean(layout, READERS)}")
    return layout
