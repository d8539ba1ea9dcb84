"""YOLO layout: data.yaml, images/<split>/ with labels/<split>/, <split>/images/ with <split>/labels/, or label files
beside the images (LabelImg, Darknet, CVAT).

A label file has one line an object: `class cx cy w h`, or a class and a polygon's corners, all in 0..1 of the upright
image; a polygon becomes its bounding box. Where data.yaml has kpt_shape, the box of a pose is read and its points are
not. An image without a label file has no objects. Class ids are the indices.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedetr.data import data_yaml
from edgedetr.data.cleaning import RawImage, RawSplit, class_infos, read_names
from edgedetr.data.detection_set import DataIssue, canonical_split_name
from edgedetr.data.image_paths import PathResolver
from edgedetr.data.images import is_image
from edgedetr.data.listing import child, children, images_in, links_as_text
from edgedetr.data.yolo_labels import Labels
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_text

SPLITS = ("train", "val", "test")
NAMES = ("classes.txt", "obj.names", "_darknet.labels")
NOTHING = ("null", "Null", "NULL", "~", "None")  # YAML's for no value, and Python's
CONFIGURATIONS = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """A split: folders of images, or text files that list images."""

    places: tuple[Path, ...]


def find(root: Path) -> dict[str, Source]:
    """Where each split's images lie; empty where this is no YOLO layout."""
    description = _description(root)
    if description is not None:
        named = _named_splits(root, description)
        if named:
            return named
    found: dict[str, Source] = {}
    pictures, folders = child(root, "images"), [path for path in children(root) if os.path.isdir(path)]
    if pictures is not None and os.path.isdir(pictures) and child(root, "labels") is not None:
        for folder in children(pictures):
            if os.path.isdir(folder):
                found[canonical_split_name(folder.name)] = Source((folder,))
        return found or {"train": Source((pictures,))}
    for folder in folders:
        inner = child(folder, "images")
        if inner is not None and os.path.isdir(inner) and child(folder, "labels") is not None:
            found[canonical_split_name(folder.name)] = Source((inner,))
    if found or _names_file(root) is None:
        return found
    lists = {
        canonical_split_name(path.stem): Source((path,))
        for path in children(root)
        if path.suffix.lower() == ".txt" and canonical_split_name(path.stem) in SPLITS
    }
    if lists:
        return lists
    for folder in [root, *folders]:
        if _side_by_side(folder):
            found["train" if folder == root else canonical_split_name(folder.name)] = Source((folder,))
    return found


def count(root: Path, split: str, source: Source) -> int:
    """Images listed in a split."""
    return len(_pictures(root, source, []))


def read(root: Path, split: str, source: Source) -> RawSplit:
    """Read the label files of one split; image ids count from 1 in the order of the paths."""
    issues: list[DataIssue] = []
    description = _description(root)
    if description is not None:
        _named_splits(root, description, issues)
    names, points = _class_names(root)
    pictures = _pictures(root, source, issues)
    labels = Labels(root, len(names), points)
    found = []
    for position, picture in enumerate(pictures, start=1):
        image = RawImage(position, picture, relative=True)
        labels.fill(image, issues)
        found.append(image)
    nowhere: list[Path] = []
    for place in source.places:
        if os.path.isdir(place):
            images_in(place, broken=nowhere)
    issues += [
        DataIssue("broken-link", str(path), "a link to what is not there; copy the file, or make the link anew", True)
        for path in nowhere
    ]
    for link in (path for place in source.places if os.path.isdir(place) for path in links_as_text(place)):
        issues.append(
            DataIssue(
                "link-as-text",
                str(link),
                "a text that names a folder, as a link becomes where links "
                "cannot be made; what lies there is left out; put the link or the folder in its place",
                True,
            )
        )
    labels.close([place for place in source.places if os.path.isdir(place)], pictures, issues)
    return RawSplit(class_infos(names), found, issues)


def _side_by_side(folder: Path) -> bool:
    """Whether images and label files of the same names lie in one folder."""
    entries = children(folder)
    stems = {path.stem for path in entries if is_image(path)}
    return any(path.suffix.lower() == ".txt" and path.stem in stems for path in entries)


def _names_file(root: Path) -> Path | None:
    """A list of class names, one a line: in the root, beside the labels, or in a folder of images and labels."""
    for folder in [root, *(path for path in children(root) if os.path.isdir(path))]:
        for name in NAMES:
            if os.path.isfile(folder / name):
                return folder / name
    return next((path for path in children(root) if path.suffix == ".names" and os.path.isfile(path)), None)


def _description(root: Path) -> Path | None:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if os.path.isfile(root / name):
            return root / name
    others = [path for path in children(root) if path.suffix.lower() in CONFIGURATIONS and os.path.isfile(path)]
    if len(others) == 1:
        return others[0] if "names" in data_yaml.read(others[0]) else None
    fitting = [path for path in others if _describes(path)]
    return fitting[0] if len(fitting) == 1 else None


def _describes(file: Path) -> bool:
    try:
        found = data_yaml.read(file)
    except DataError:
        return False
    return "names" in found and any(key in found for key in ("train", "val", "valid"))


def _named_splits(root: Path, description: Path, absent: list[DataIssue] | None = None) -> dict[str, Source]:
    """The splits of a data.yaml; `absent` takes a word on a test split that it names and that is not there.

    Roboflow names ../test/images whether or not the project has one, so that a set without it is no mistake.
    """
    described = data_yaml.read(description)
    base = root
    if isinstance(described.get("path"), str):
        # `path` often names the author's own folder; it counts only where it lies inside this one.
        candidate = PathResolver(root, [root]).find(described["path"], folder=True)
        base = candidate if candidate is not None and os.path.isdir(candidate) else root
    places = PathResolver(root, list(dict.fromkeys([base, root])))
    found: dict[str, Source] = {}
    for key in ("train", "val", "valid", "validation", "test"):
        value = described.get(key)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        texts = [text for text in texts if text not in NOTHING]
        try:
            there = tuple(_place(places, text, key, description) for text in texts if text)
        except DataError as error:
            if key != "test" or not found:
                raise
            if absent is not None:
                absent.append(
                    DataIssue("missing-split", str(description), f"{error}; there is no test split now", True)
                )
            continue
        if there and canonical_split_name(key) not in found:
            found[canonical_split_name(key)] = Source(there)
    return found


def _place(places: PathResolver, text: Any, key: str, description: Path) -> Path:
    place = places.find(text, folder=True)
    if place is not None and not os.path.exists(place):
        place = _any_case(places, text)
    if place is None or not (os.path.isdir(place) or (os.path.isfile(place) and not is_image(place))):
        raise DataError(
            f"{description}: {key}: {str(text)[:200]!r} is no folder or list inside {places.root}; "
            "expected one, as in 'train: images/train'; correct the line or take it out"
        )
    return place


def _any_case(places: PathResolver, text: str) -> Path | None:
    """The folder that `text` names but for its case: images/train where the disk has Images/Train."""
    for base in places.folders:
        place: Path | None = base
        for part in Path(text.replace("\\", "/")).parts:
            place = child(place, part) if place is not None and part not in ("..", "/") else None
        if place is not None:
            return place
    return None


def _pictures(root: Path, source: Source, issues: list[DataIssue]) -> list[Path]:
    found: list[Path] = []
    for place in source.places:
        if os.path.isdir(place):
            found += images_in(place)
            continue
        places = PathResolver(root, list(dict.fromkeys([root, place.parent])))
        for line in filter(None, map(str.strip, read_text(place, DataError).splitlines())):
            path = places.find(line)
            if path is not None:
                found.append(path)
            else:
                issues.append(
                    DataIssue(
                        "path-outside",
                        str(place),
                        f"{line[:200]!r} leaves the data directory; "
                        f"write it as it stands below {root}, as in images/train/a.jpg",
                        True,
                    )
                )
    return list(dict.fromkeys(found))


def _class_names(root: Path) -> tuple[list[str], tuple[int, int] | None]:
    """The names, and how many points of how many numbers each pose has, where data.yaml has kpt_shape."""
    description = _description(root)
    if description is not None:
        described = data_yaml.read(description)
        names = described.get("names")
        if isinstance(names, str) and names and os.path.isfile(listing := root / Path(names).name):
            names = list(read_names(listing))
        if isinstance(names, dict):
            names = _in_order(names, description)
        if isinstance(names, list) and names:
            if not all(isinstance(name, str) for name in names):
                raise DataError(f"{description}: names is {str(names)[:60]}; expected a flat list or mapping of names")
            stated = described.get("nc")
            if isinstance(stated, str) and re.fullmatch("[0-9]{1,9}", stated) and int(stated) != len(names):
                raise DataError(f"{description}: nc is {stated}, but there are {len(names)} names; correct one of them")
            return names, _points(described.get("kpt_shape"), description)
    named = _names_file(root)
    if named is not None:
        return read_names(named), None
    several = [path.name for path in children(root) if path.suffix.lower() in CONFIGURATIONS and _describes(path)]
    if description is None and len(several) > 1:
        raise DataError(
            f"{root}: {', '.join(several[:8])} describe a set each; expected one; call the right one data.yaml"
        )
    raise DataError(
        f"{root}: no class names; expected 'names: [first, second]' in data.yaml, or classes.txt with one a line"
    )


def _in_order(names: dict[str, Any], description: Path) -> list[Any]:
    if sorted(names) != sorted(str(index) for index in range(len(names))):
        raise DataError(f"{description}: names has the keys {list(names)[:20]}; expected 0, 1, 2, ... without a gap")
    return [names[str(index)] for index in range(len(names))]


def _points(shape: Any, description: Path) -> tuple[int, int] | None:
    if shape is None or shape == "":
        return None
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(part, str) and re.fullmatch("[0-9]{1,4}", part) for part in shape)
        and shape[1] in ("2", "3")
    ):
        return int(shape[0]), int(shape[1])
    raise DataError(
        f"{description}: kpt_shape is {str(shape)[:60]}; expected the number of points and of numbers each,"
        " as in 'kpt_shape: [17, 3]'"
    )
