"""Read the YOLO layout: data.yaml, images/<split>/ with labels/<split>/, <split>/images/ with <split>/labels/, or label
files next to the images (LabelImg, Darknet, CVAT).

A label file has one line per object: `class cx cy w h`, or a class and the corners of a polygon, all in 0..1 of the
upright image; a polygon becomes its bounding box. Where data.yaml has kpt_shape, the box of a pose is read and its
points are not. An image without a label file has no objects. Class ids are the indices.
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
from edgedetr.data.listing import BROKEN_LINK, child, children, images_in, links_as_text
from edgedetr.data.yolo_labels import Labels, drop_misread
from edgedetr.errors import DataError
from edgedetr.storage.reading import read_text

SPLITS = ("train", "val", "test")
NAMES = ("classes.txt", "obj.names", "_darknet.labels")
NO_VALUE = ("null", "Null", "NULL", "~", "None")  # of YAML, and of Python
CONFIGURATIONS = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """A split: folders of images, or text files that list images."""

    paths: tuple[Path, ...]


def find(root: Path) -> dict[str, Source]:
    """The image folders or lists of each split; empty where this is not a YOLO layout."""
    description = describing_file(root)
    if description is not None:
        named = _named_splits(root, description)
        if named:
            return named
    found: dict[str, Source] = {}
    images, folders = child(root, "images"), [path for path in children(root) if os.path.isdir(path)]
    if images is not None and os.path.isdir(images) and child(root, "labels") is not None:
        for folder in children(images):
            if os.path.isdir(folder):
                found[canonical_split_name(folder.name)] = Source((folder,))
        return found or {"train": Source((images,))}
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
    lists |= _darknet_lists(root)
    if lists:
        return lists
    for folder in [root, *folders]:
        if _side_by_side(folder):
            found["train" if folder == root else canonical_split_name(folder.name)] = Source((folder,))
    return found


def _darknet_lists(root: Path) -> dict[str, Source]:
    """The lists that Darknet's obj.data names, as in `valid = data/my_val.txt`. Errors: DataError where one is gone."""
    found: dict[str, Source] = {}
    for file in (path for path in children(root) if path.suffix == ".data" and os.path.isfile(path)):
        resolver = PathResolver(root, [root])
        for line in read_text(file, DataError).splitlines():
            key, equals, value = (part.strip() for part in line.partition("="))
            if equals and value and canonical_split_name(key) in SPLITS:
                found[canonical_split_name(key)] = Source((_image_source(resolver, value, key, file),))
    return found


def count(root: Path, split: str, source: Source) -> int:
    """Images listed in a split."""
    return len(_image_files(root, source, []))


def read(root: Path, split: str, source: Source) -> RawSplit:
    """Read the label files of one split; image ids count from 1 in the order of the paths."""
    issues: list[DataIssue] = []
    description = describing_file(root)
    if description is not None:
        _named_splits(root, description, issues)
    names, points = _class_names(root, source)
    paths = _image_files(root, source, issues)
    labels = Labels(root, len(names), points)
    found = []
    for position, path in enumerate(paths, start=1):
        image = RawImage(position, path, relative=True)
        labels.fill(image, issues)
        found.append(image)
    drop_misread(found, issues)
    folders = [path for path in source.paths if os.path.isdir(path)]
    broken: list[Path] = []
    for folder in folders:
        images_in(folder, broken=broken)
    issues += [DataIssue("broken-link", str(link), BROKEN_LINK, True) for link in broken]
    for link in (link for folder in folders for link in links_as_text(folder)):
        what = "a text file that contains the path of a folder, in place of a link; the folder is left out; "
        issues.append(DataIssue("link-as-text", str(link), what + "replace the file by the link or the folder", True))
    labels.close(folders, paths, issues)
    return RawSplit(class_infos(names), found, issues)


def _side_by_side(folder: Path) -> bool:
    """Whether a folder has images and label files of the same names."""
    entries = children(folder)
    stems = {path.stem for path in entries if is_image(path)}
    return any(path.suffix.lower() == ".txt" and path.stem in stems for path in entries)


def _names_file(root: Path, source: Source | None = None) -> Path | None:
    """A list of class names, one per line: in the root, in a folder of the split or next to it, or in any folder.

    Errors: DataError where the root's gives other names to the split's numbers than the split's own.
    """
    folders = [path for of in (source.paths if source else ()) for path in (of, of.parent) if os.path.isdir(path)]
    found = [path for folder in (root, *folders) if (path := _names_in(folder)) is not None]
    for other in found[1:]:
        pairs = zip(read_names(found[0], numbered=True), read_names(other, numbered=True))
        if found[0].parent == root and any(one != two for one, two in pairs):
            raise DataError(f"{found[0]} and {other} give other names to the same numbers; keep one of them")
    if found:
        return found[0]
    inside = [path for folder in children(root) if os.path.isdir(folder) and (path := _names_in(folder)) is not None]
    named = (path for path in children(root) if path.suffix == ".names" and os.path.isfile(path))
    return next(iter(inside), next(named, None))


def _names_in(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if os.path.isfile(folder / name)), None)


def describing_file(root: Path) -> Path | None:
    """The YAML file of a folder that describes its splits and classes: data.yaml, or the only one; None without."""
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
    return "names" in found and any(canonical_split_name(key) in ("train", "val") for key in found)


def _named_splits(root: Path, description: Path, absent: list[DataIssue] | None = None) -> dict[str, Source]:
    """The splits of a data.yaml; `absent` receives an issue where its test split does not exist.

    Roboflow writes ../test/images into every data.yaml, so a missing test split is not an error.
    """
    described = data_yaml.read(description)
    base, hint = root, ""
    if isinstance(stated := described.get("path"), str):
        # `path` is often a folder of the author's machine; it is used only where it is inside the root.
        candidate = PathResolver(root, [root]).find(stated, folder=True)
        base = candidate if candidate is not None and os.path.isdir(candidate) else root
        if base == root and os.path.isdir(elsewhere := os.path.normpath(os.path.abspath(root / stated))):
            hint = f"; its path is {elsewhere}: copy {description.name} there, and name that folder by --data"
    resolver = PathResolver(root, list(dict.fromkeys([base, root])))
    found: dict[str, Source] = {}
    # CVAT writes the names of its subsets: `Train: Train.txt`.
    keys = [key for split in SPLITS for key in described if canonical_split_name(key) == split]
    for key in keys:
        value = described[key]
        texts = [text for text in (value if isinstance(value, list) else [value]) if text not in ("", *NO_VALUE)]
        try:
            there = tuple(_image_source(resolver, text, key, description, hint) for text in texts)
        except DataError as error:
            if canonical_split_name(key) != "test" or not found:
                raise
            if absent is not None:
                absent.append(DataIssue("missing-split", str(description), f"{error}; the set has no test split", True))
            continue
        if there and found.setdefault(canonical_split_name(key), Source(there)) != Source(there):
            split = canonical_split_name(key)
            raise DataError(
                f"{description}: {key} is one of two names of the split {split}, with other images; keep one"
            )
    return found


def _image_source(resolver: PathResolver, text: Any, key: str, description: Path, hint: str = "") -> Path:
    path = resolver.find(text, folder=True)
    if path is not None and not os.path.exists(path):
        path = _any_case(resolver, text)
    if path is None or not (os.path.isdir(path) or (os.path.isfile(path) and not is_image(path))):
        raise DataError(
            f"{description}: {key}: {str(text)[:200]!r} is not a folder or list inside {resolver.root}; "
            f"expected one, as in 'train: images/train'{hint or '; correct or remove the line'}"
        )
    return path


def _any_case(resolver: PathResolver, text: str) -> Path | None:
    """The folder that `text` names, ignoring case: images/train where the disk has Images/Train."""
    for base in resolver.folders:
        path: Path | None = base
        for part in Path(text.replace("\\", "/")).parts:
            path = child(path, part) if path is not None and part not in ("..", "/") else None
        if path is not None:
            return path
    return None


def _image_files(root: Path, source: Source, issues: list[DataIssue]) -> list[Path]:
    found: list[Path] = []
    for folder_or_list in source.paths:
        if os.path.isdir(folder_or_list):
            found += images_in(folder_or_list)
            continue
        resolver = PathResolver(root, list(dict.fromkeys([root, folder_or_list.parent])))
        for line in filter(None, map(str.strip, read_text(folder_or_list, DataError).splitlines())):
            path = resolver.find(line)
            if path is not None:
                found.append(path)
            else:
                issues.append(
                    DataIssue(
                        "path-outside",
                        str(folder_or_list),
                        f"{line[:200]!r} leaves the data directory; "
                        f"write the path below {root}, as in images/train/a.jpg",
                        True,
                    )
                )
    return list(dict.fromkeys(found))


def _class_names(root: Path, source: Source) -> tuple[list[str], tuple[int, int] | None]:
    """The names, and (points, numbers per point) of poses, where data.yaml has kpt_shape."""
    description = describing_file(root)
    if description is not None:
        described = data_yaml.read(description)
        names = described.get("names")
        if isinstance(names, str) and names and os.path.isfile(listing := root / Path(names).name):
            names = list(read_names(listing, numbered=True))
        if isinstance(names, dict):
            names = _in_order(names, description)
        if isinstance(names, list) and names:
            if not all(isinstance(name, str) for name in names):
                raise DataError(f"{description}: names is {str(names)[:60]}; expected a flat list or mapping of names")
            stated = described.get("nc")
            if isinstance(stated, str) and re.fullmatch("[0-9]{1,9}", stated) and int(stated) != len(names):
                raise DataError(f"{description}: nc is {stated}, but there are {len(names)} names; correct one of them")
            return names, _points(described.get("kpt_shape"), description)
    named = _names_file(root, source)
    if named is not None:
        return read_names(named, numbered=True), None
    several = [path.name for path in children(root) if path.suffix.lower() in CONFIGURATIONS and _describes(path)]
    if description is None and len(several) > 1:
        raise DataError(
            f"{root}: {', '.join(several[:8])} each describe a data set; expected one; name the right one data.yaml"
        )
    raise DataError(
        f"{root}: no class names; expected 'names: [first, second]' in data.yaml, or classes.txt with one per line"
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
