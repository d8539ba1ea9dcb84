"""Pascal VOC layout: Annotations/*.xml, JPEGImages/ (or images/), ImageSets/Main/<split>.txt; or <split>/*.xml beside
the images; FiftyOne's labels/*.xml and data/; or one folder with all of it.

Corners are read as x = xmin, width = xmax - xmin, as the usual converters do. `difficult` objects become crowd: a
detector may find them without gain or loss, as the VOC evaluation has it. Class names come from classes.txt, or sorted
from the files. `<filename>` says which image a file is about; where there is none of that name, the file's own name.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from edgedetr.data import listing
from edgedetr.data.cleaning import RawImage, RawObject, RawSplit, class_infos, numbers, read_names
from edgedetr.data.detection_set import DataIssue, canonical_split_name
from edgedetr.data.listing import child, children, fold
from edgedetr.data.voc_xml import parse
from edgedetr.errors import DataError, did_you_mean
from edgedetr.storage.reading import read_text

SPLITS = ("train", "val", "test", "trainval")
FLAGGED = re.compile(r"(?P<name>.+?)\s+-?[01]")  # 000012 -1: the lists of one class say whether it is there
ENDINGS = (".xml", ".jpg", ".jpeg", ".png", ".bmp", ".jfif", ".webp", ".tif", ".tiff")
TEXTS = ("annotations", "labels", "xmls", "xml")
PICTURES = ("jpegimages", "images", "data", "imgs", "img")
NAMED = 8  # files that a issue about many of them names


@dataclass(frozen=True)
class Source:
    """A split: its annotation files, the folder of its images, and whether every image there is to have a file.

    ignored   lists of ImageSets/Main that are of no known split
    """

    files: tuple[Path, ...]
    pictures: Path
    whole: bool = True
    ignored: tuple[Path, ...] = ()


def find(root: Path) -> dict[str, Source]:
    """Annotation files of each split; empty where this is no VOC layout."""
    found: dict[str, Source] = {}
    folders = {path.name.lower(): path for path in children(root) if os.path.isdir(path)}
    pictures = next((folders[name] for name in PICTURES if name in folders), None)
    texts = next(
        (
            folders[name]
            for name in TEXTS
            if name in folders and (_own_xml(folders[name]) or (name == "annotations" and _xml(folders[name])))
        ),
        None,
    )
    annotated = _xml(texts) if texts is not None and pictures is not None else ()
    if texts is not None and pictures is not None:
        sets = child(root, "ImageSets")
        main = child(sets, "Main") if sets is not None else None
        lists = [
            file
            for file in (children(main) if main is not None and os.path.isdir(main) else [])
            if file.suffix.lower() == ".txt" and os.path.isfile(file)
        ]
        for file in lists:
            split = canonical_split_name(file.stem)
            # Others are one class's (aeroplane_train.txt).
            if split in SPLITS:
                found[split] = Source(_listed(texts, file, annotated), pictures, whole=False)
        ignored = tuple(file for file in lists if file.stem.lower() != "default")  # CVAT's, of all images
        return found or _split_folders(texts, pictures) or {"train": Source(annotated, pictures, ignored=ignored)}
    for folder in folders.values():
        if files := _own_xml(folder):
            found[canonical_split_name(folder.name)] = Source(files, folder)
    if not found and (files := _own_xml(root)):
        return {"train": Source(files, root)}
    return found


def _split_folders(texts: Path, pictures: Path) -> dict[str, Source]:
    """Splits that are folders of the annotations: Annotations/train/*.xml, with JPEGImages/train/ or JPEGImages/."""
    within = {path: files for path in children(texts) if os.path.isdir(path) and (files := _xml(path))}
    if not any(canonical_split_name(path.name) in SPLITS for path in within):
        return {}
    found: dict[str, Source] = {}
    for path, files in within.items():
        there = {canonical_split_name(inner.name): inner for inner in children(pictures) if os.path.isdir(inner)}
        own = there.get(canonical_split_name(path.name))
        found[canonical_split_name(path.name)] = Source(files, own or pictures, whole=own is not None)
    if loose := _own_xml(texts):  # beside the folders: for training, as without any folder
        more = found["train"].files if "train" in found else ()
        found["train"] = Source((*loose, *more), pictures, whole=False)
    return found


def count(root: Path, split: str, source: Source) -> int:
    """Images listed in a split."""
    return len(source.files)


def read(root: Path, split: str, source: Source) -> RawSplit:
    """Read the files of one split; image ids count from 1 in the split's order."""
    issues: list[DataIssue] = []
    names = _class_names(root)
    index = {name: position for position, name in enumerate(names)}
    trees: dict[Path, ElementTree.Element] = {}
    for file in source.files:
        if not os.path.isfile(file):
            issues.append(
                DataIssue("missing-annotation", str(file), "listed in the split, but there is no such file", True)
            )
            continue
        try:
            trees[file] = parse(file)
        except DataError as error:
            issues.append(DataIssue("unreadable-annotation", str(file), str(error), True))
    pictures = _Pictures(source.pictures, [_text(tree, "filename") for tree in trees.values()])
    found = []
    for position, file in enumerate(source.files, start=1):
        if file not in trees:
            continue
        image = RawImage(position, pictures.of(file, _text(trees[file], "filename"), issues), _stated_size(trees[file]))
        for thing in trees[file].findall("object"):
            _annotate(thing, image, index, file, issues)
        found.append(image)
    twice = [path for path, times in Counter(image.path for image in found).items() if times > 1]
    issues += [
        DataIssue(
            "image-listed-twice",
            str(path),
            "several XML files are about this image, each with objects of its own; expected one",
        )
        for path in twice
    ]
    if source.ignored:
        issues.append(
            DataIssue(
                "unused-list",
                str(source.ignored[0].parent),
                f"{len(source.ignored)} lists are of no "
                f"known split and were not used: {', '.join(p.name for p in source.ignored[:NAMED])}; "
                f"every XML file was taken for train; call them {', '.join(SPLITS[:3])}",
            )
        )
    if source.whole:
        issues += pictures.without({image.path for image in found})
    return RawSplit(class_infos(names), found, issues, listed=len(source.files))


class _Pictures:
    """The images of a split, by name and by name without its ending.

    wanted   what the annotations of the split say in <filename>
    """

    def __init__(self, folder: Path, wanted: list[str]) -> None:
        self.folder = folder
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in listing.images_in(folder):
            self.by_name[fold(path.name)].append(path)
            self.by_stem[fold(path.stem)].append(path)
        self.wanted = Counter(fold(PurePosixPath(name.replace("\\", "/")).name) for name in wanted)

    def of(self, file: Path, said: str, issues: list[DataIssue]) -> Path:
        """The image that an annotation file is about."""
        own = self._nearest(self.by_stem.get(fold(file.stem), []), file, file.stem)
        beside = [path for path in own if path.parent.name == file.parent.name]
        own = beside or own  # Annotations/a/1.xml is about JPEGImages/a/1.jpg, not b/1.jpg
        name = PurePosixPath(said.replace("\\", "/")).name
        named = self.by_name.get(fold(name), []) or self.by_stem.get(fold(name), [])
        if named and (self.wanted[fold(name)] == 1 or not own):
            return self._nearest(named, file, name)[0]
        if named and own and self.wanted[fold(name)] > 1 and own[0] != self._nearest(named, file, name)[0]:
            issues.append(
                DataIssue(
                    "filename-repeated",
                    str(file),
                    f"<filename> is {name!r} in "
                    f"{self.wanted[fold(name)]} files; {own[0].name}, of this file's name, was taken",
                )
            )
        if len(own) > 1:
            issues.append(
                DataIssue(
                    "same-name",
                    str(file),
                    f"{', '.join(path.name for path in own)}: nothing says "
                    f"which of them it is about; {own[0].name} was taken",
                )
            )
        return own[0] if own else self.folder / (name or f"{file.stem}.jpg")

    def _nearest(self, found: list[Path], file: Path, name: str) -> list[Path]:
        """Those of the exact name and of the same sub-folder first."""
        return sorted(found, key=lambda path: (path.parent.name != file.parent.name, path.name != name, path))

    def without(self, used: set[Path]) -> list[DataIssue]:
        beside = sorted(path for paths in self.by_name.values() for path in paths if path not in used)
        if not beside:
            return []
        return [
            DataIssue(
                "unlisted-image",
                str(self.folder),
                f"{len(beside)} images have no XML file and are left out: "
                f"{', '.join(path.name for path in beside[:NAMED])}{', ...' if len(beside) > NAMED else ''}",
            )
        ]


def _own_xml(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in children(folder) if path.suffix.lower() == ".xml" and os.path.isfile(path))


def _xml(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in listing.files(folder) if path.suffix.lower() == ".xml")


def _listed(texts: Path, file: Path, annotated: tuple[Path, ...]) -> tuple[Path, ...]:
    """The annotation files that the lines of a list name: whole lines, for names may hold spaces."""
    there = {fold(path.relative_to(texts).with_suffix("").as_posix()): path for path in annotated}
    found = []
    for line in filter(None, map(str.strip, read_text(file, DataError).splitlines())):
        name = line.replace("\\", "/")
        flagged = FLAGGED.fullmatch(name)
        bare = str(PurePosixPath(name).with_suffix("")) if name.lower().endswith(ENDINGS) else name
        spellings = [name, bare, flagged["name"] if flagged else name]
        spellings += [PurePosixPath(spelling).name for spelling in spellings]
        path = next((there[fold(spelling)] for spelling in spellings if fold(spelling) in there), None)
        if path is None and ("/" in name or "\0" in name):
            raise DataError(f"{file}: {line[:200]!r} is a path; expected the bare names of files in {texts.name}/")
        found.append(path or texts / f"{name[:200]}.xml")
    return tuple(dict.fromkeys(found))


def _class_names(root: Path) -> list[str]:
    file = root / "classes.txt"
    if os.path.isfile(file):
        names = read_names(file)
        if len(set(names)) != len(names):
            raise DataError(f"{file}: {names[:20]}; expected class names, one a line, each once")
        return names
    found: set[str] = set()
    faults = []
    for path in dict.fromkeys(path for source in find(root).values() for path in source.files):
        if not os.path.isfile(path):
            continue
        try:
            found.update(_text(thing, "name") for thing in parse(path).findall("object"))
        except DataError as error:
            faults.append(error)  # `read` names this file
    found.discard("")
    if not found and faults:
        raise DataError(f"{faults[0]}" + (f" ({len(faults)} XML files cannot be read)" if len(faults) > 1 else ""))
    if not found:
        raise DataError(f"{root}: no object names in the XML files and no classes.txt; expected at least one class")
    return sorted(found)


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _stated_size(tree: ElementTree.Element) -> tuple[int, int] | None:
    size = numbers((_number(_text(tree, "size/height")), _number(_text(tree, "size/width"))), 2)
    return (int(size[0]), int(size[1])) if size is not None and min(size) >= 1 else None


def _annotate(
    thing: ElementTree.Element, image: RawImage, index: dict[str, int], file: Path, issues: list[DataIssue]
) -> None:
    name = _text(thing, "name")
    corners = numbers([_number(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")], 4)
    if name not in index:
        what = (
            f"object {name[:80]!r} is not in classes.txt{did_you_mean(name[:80], index)}"
            if name
            else "an object has no name"
        )
        issues.append(DataIssue("unknown-class", str(file), what, True, 1))
    elif corners is None:
        issues.append(
            DataIssue("bad-box", str(file), f"an object {name!r} has no bndbox of four finite numbers", True, 1)
        )
    else:
        image.objects.append(
            RawObject(
                index[name],
                (corners[0], corners[1], corners[2], corners[3]),
                crowd=_text(thing, "difficult").lower() in ("1", "true"),
            )
        )
