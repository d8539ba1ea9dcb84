"""YOLO layout: data.yaml, images/<split>/ with labels/<split>/ or <split>/images/ with <split>/labels/.

A label file has one line an object: `class cx cy w h`, or a class and a polygon's corners, all in 0..1 of the upright
picture; a polygon becomes its bounding box. An image without a label file has no objects. Class ids are the indices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from edgedetr.data import data_yaml, images
from edgedetr.data.clean import RawImage, RawObject, RawSplit, class_infos, inside, numbers
from edgedetr.data.form import Finding
from edgedetr.data.names import canonical
from edgedetr.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """A split: folders of pictures, or text files that list pictures."""

    places: tuple[Path, ...]


def find(root: Path) -> dict[str, Source]:
    """Where each split's pictures lie; empty where this is no YOLO layout."""
    description = _description(root)
    if description is not None:
        named = _named_splits(root, description)
        if named:
            return named
    found: dict[str, Source] = {}
    if (root / "images").is_dir() and (root / "labels").is_dir():
        for folder in sorted(path for path in (root / "images").iterdir() if path.is_dir()):
            found[canonical(folder.name)] = Source((folder,))
        return found or {"train": Source((root / "images",))}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if (folder / "images").is_dir() and (folder / "labels").is_dir():
            found[canonical(folder.name)] = Source((folder / "images",))
    return found


def count(root: Path, split: str, source: Source) -> int:
    """Images listed in a split."""
    return len(_pictures(root, source, []))


def read(root: Path, split: str, source: Source) -> RawSplit:
    """Read the label files of one split; image ids count from 1 in the order of the paths."""
    findings: list[Finding] = []
    names = _class_names(root)
    found = []
    for position, picture in enumerate(_pictures(root, source, findings), start=1):
        image = RawImage(position, picture, relative=True)
        _label(image, _label_file(root, picture), len(names), findings)
        found.append(image)
    return RawSplit(class_infos(names), found, findings)


def _description(root: Path) -> Path | None:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    others = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    return others[0] if len(others) == 1 and "names" in data_yaml.read(others[0]) else None


def _named_splits(root: Path, description: Path) -> dict[str, Source]:
    described = data_yaml.read(description)
    base = root
    if isinstance(described.get("path"), str):
        # `path` often names the author's own folder; it counts only where it lies inside this one.
        candidate = inside(root, described["path"])
        base = candidate if candidate is not None and candidate.is_dir() else root
    found = {}
    for key in SPLITS if "val" in described else ("train", "valid", "test"):
        value = described.get(key)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        places = tuple(_place(base, text, key, description) for text in texts if text)
        if places:
            found[canonical(key)] = Source(places)
    return found


def _place(base: Path, text: str, key: str, description: Path) -> Path:
    # Roboflow writes ../train/images for a folder that lies beside data.yaml.
    place = inside(base, text[3:] if text.startswith("../") else text)
    if place is None or not place.exists():
        raise DataError(f"{description}: {key}: {text!r} is no folder or list inside {base}; expected one, "
                        "as in 'train: images/train'; correct the line or take it out")
    return place


def _pictures(root: Path, source: Source, findings: list[Finding]) -> list[Path]:
    found: list[Path] = []
    for place in source.places:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if images.is_image(path))
            continue
        for line in place.read_text(encoding="utf-8-sig").splitlines():
            path = inside(root, line.strip()) if line.strip() else None
            if path is not None:
                found.append(path)
            elif line.strip():
                findings.append(Finding("path-outside", str(place), f"{line.strip()!r} leaves the data directory",
                                        True))
    return list(dict.fromkeys(found))


def _class_names(root: Path) -> list[str]:
    description = _description(root)
    if description is not None:
        described = data_yaml.read(description)
        names = described.get("names")
        if isinstance(names, dict):
            names = _in_order(names, description)
        if isinstance(names, list) and names:
            if len(set(names)) != len(names):
                raise DataError(f"{description}: names {names[:20]}; expected each name once")
            stated = described.get("nc")
            if isinstance(stated, str) and stated.isdigit() and int(stated) != len(names):
                raise DataError(f"{description}: nc is {stated}, but there are {len(names)} names; correct one of them")
            return names
    for listing in (root / "classes.txt", root / "labels" / "classes.txt"):
        if listing.is_file():
            names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if names and len(set(names)) == len(names):
                return names
            raise DataError(f"{listing}: {names[:20]}; expected class names, one a line, each once")
    raise DataError(f"{root}: no class names; expected 'names: [first, second]' in data.yaml, "
                    "or classes.txt with one a line")


def _in_order(names: dict[str, str], description: Path) -> list[str]:
    if sorted(names) != sorted(str(index) for index in range(len(names))):
        raise DataError(f"{description}: names has the keys {list(names)[:20]}; expected 0, 1, 2, ... without a gap")
    return [names[str(index)] for index in range(len(names))]


def _label_file(root: Path, picture: Path) -> Path:
    parts = list(PurePosixPath(picture.relative_to(root).with_suffix(".txt").as_posix()).parts)
    folders = [position for position, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return root.joinpath(*parts)


def _label(image: RawImage, file: Path, classes: int, findings: list[Finding]) -> None:
    if not file.is_file():
        findings.append(Finding("no-label-file", str(image.path),
                                f"no {file.name}; taken as a picture without objects"))
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        findings.append(Finding("unreadable-annotation", str(file),
                                f"not text ({error.reason}); its objects are left out", True))
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        what = _parse(line.split(), classes)
        if isinstance(what, RawObject):
            image.objects.append(what)
        else:
            findings.append(Finding(what[0], f"{file}:{number}", f"{line.strip()[:60]!r}: {what[1]}", True))


def _parse(words: list[str], classes: int) -> RawObject | tuple[str, str]:
    """The object of a line, or the kind and sentence of what is wrong with it."""
    values = numbers(_floats(words), len(words))
    polygon = len(words) >= 7 and len(words) % 2 == 1
    if values is None or not (len(words) == 5 or polygon):
        return "bad-box", "expected a class and cx cy w h, or a class and at least three corners, all finite numbers"
    if values[0] != int(values[0]) or not 0 <= values[0] < classes:
        return "unknown-class", f"class {words[0]}; known are 0..{classes - 1}"
    if polygon:
        x, y = np.array(values[1::2]), np.array(values[2::2])
        return RawObject(int(values[0]), (float(x.min()), float(y.min()), float(x.max()), float(y.max())))
    cx, cy, w, h = values[1:]
    if max(abs(value) for value in values[1:]) > 2:
        return "bad-box", "coordinates far beyond 1; expected 0..1 of the picture, not pixels"
    return RawObject(int(values[0]), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))


def _floats(words: Iterable[str]) -> list[float | None]:
    found: list[float | None] = []
    for word in words:
        try:
            found.append(float(word))
        except ValueError:
            found.append(None)
    return found
