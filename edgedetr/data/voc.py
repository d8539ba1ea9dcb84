"""Read the Pascal VOC layout: Annotations/*.xml, JPEGImages/ (or images/), ImageSets/Main/<split>.txt; or <split>/*.xml
next to the images; FiftyOne's labels/*.xml and data/; or one folder with all files. Without ImageSets/Main, the lists
are ImageSets/<split>.txt or <split>.txt.

Corners are read as x = xmin, width = xmax - xmin, as the usual converters do. `difficult` objects become crowd, because
the VOC evaluation ignores them. Class names come from classes.txt, else from the files, sorted. An XML file describes
the image of its `<filename>`, else the image of its own name.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from edgedetr.data import listing
from edgedetr.data.cleaning import RawImage, RawObject, RawSplit, class_infos, numbers, read_names, turn
from edgedetr.data.detection_set import DataIssue, canonical_split_name
from edgedetr.data.listing import child, children, fold
from edgedetr.data.voc_xml import parse
from edgedetr.errors import DataError, did_you_mean
from edgedetr.storage.reading import read_text

SPLITS = ("train", "val", "test", "trainval")
FLAGGED = re.compile(r"(?P<name>.+?)\s+-?[01]")  # "000012 -1": lists of one class flag whether it is present
ENDINGS = (".xml", ".jpg", ".jpeg", ".png", ".bmp", ".jfif", ".webp", ".tif", ".tiff")
ANNOTATION_FOLDERS = ("annotations", "labels", "xmls", "xml")
IMAGE_FOLDERS = ("jpegimages", "images", "data", "imgs", "img")
NAMED = 8  # files that one issue lists by name


@dataclass(frozen=True)
class Source:
    """A split: its annotation files and the folder of its images.

    complete  every image of the folder should have an annotation file
    ignored   lists of ImageSets/Main that belong to no known split
    """

    files: tuple[Path, ...]
    image_folder: Path
    complete: bool = True
    ignored: tuple[Path, ...] = ()


def find(root: Path) -> dict[str, Source]:
    """Annotation files of each split; empty where this is not a VOC layout."""
    found: dict[str, Source] = {}
    folders = {path.name.lower(): path for path in children(root) if os.path.isdir(path)}
    image_folder = next((folders[name] for name in IMAGE_FOLDERS if name in folders), None)
    annotations = next(
        (
            folders[name]
            for name in ANNOTATION_FOLDERS
            if name in folders and (_own_xml(folders[name]) or (name == "annotations" and _xml(folders[name])))
        ),
        None,
    )
    annotated = _xml(annotations) if annotations is not None and image_folder is not None else ()
    if annotations is not None and image_folder is not None:
        lists = _lists(root)
        for file in lists:
            split = _split_of(file)
            # Other lists are of one class (aeroplane_train.txt).
            if split in SPLITS:
                found[split] = Source(_listed(annotations, file, annotated), image_folder, complete=False)
        ignored = tuple(file for file in lists if file.stem.lower() != "default")  # CVAT's list of all images
        return (
            found
            or _split_folders(annotations, image_folder)
            or {"train": Source(annotated, image_folder, ignored=ignored)}
        )
    for folder in folders.values():
        if files := _own_xml(folder):
            found[canonical_split_name(folder.name)] = Source(files, folder)
    if not found and (files := _own_xml(root)):
        return {"train": Source(files, root)}
    return found


def _lists(root: Path) -> list[Path]:
    """The text files of ImageSets/Main; where none of them is a split, those of splits in ImageSets/ or in the root."""
    sets = child(root, "ImageSets")
    main = child(sets, "Main") if sets is not None else None
    folders = [folder for folder in (main, sets, root) if folder is not None and os.path.isdir(folder)]
    lists = [
        [file for file in children(folder) if file.suffix.lower() == ".txt" and os.path.isfile(file)]
        for folder in folders
    ]
    of_splits = ([file for file in files if _split_of(file) in SPLITS] for files in lists)
    return next(filter(None, of_splits), lists[0] if folders[0] == main else [])


def _split_of(listing: Path) -> str:
    """The split that a text file lists; PaddlePaddle calls it train_list.txt."""
    return canonical_split_name(listing.stem.lower().removesuffix("_list"))


def _split_folders(annotations: Path, image_folder: Path) -> dict[str, Source]:
    """Splits that are folders of the annotations: Annotations/train/*.xml, with JPEGImages/train/ or JPEGImages/."""
    within = {path: files for path in children(annotations) if os.path.isdir(path) and (files := _xml(path))}
    if not any(canonical_split_name(path.name) in SPLITS for path in within):
        return {}
    found: dict[str, Source] = {}
    for path, files in within.items():
        there = {canonical_split_name(inner.name): inner for inner in children(image_folder) if os.path.isdir(inner)}
        own = there.get(canonical_split_name(path.name))
        found[canonical_split_name(path.name)] = Source(files, own or image_folder, complete=own is not None)
    if loose := _own_xml(annotations):  # files next to the folders: the train split, as without folders
        more = found["train"].files if "train" in found else ()
        found["train"] = Source((*loose, *more), image_folder, complete=False)
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
                DataIssue("missing-annotation", str(file), "listed in the split, but the file does not exist", True)
            )
            continue
        try:
            trees[file] = parse(file)
        except DataError as error:
            issues.append(DataIssue("unreadable-annotation", str(file), str(error), True))
    image_index = _ImageIndex(source.image_folder, [_text(tree, "filename") for tree in trees.values()])
    found = []
    for position, file in enumerate(source.files, start=1):
        if file not in trees:
            continue
        path = image_index.of(file, _text(trees[file], "filename"), issues)
        image = RawImage(position, path, _stated_size(trees[file]))
        for item in trees[file].findall("object"):
            _annotate(item, image, index, file, issues)
        found.append(image)
    repeated = [path for path, times in Counter(image.path for image in found).items() if times > 1]
    issues += [
        DataIssue(
            "image-listed-twice", str(path), "several XML files describe this image with separate objects; expected one"
        )
        for path in repeated
    ]
    if source.ignored:
        issues.append(
            DataIssue(
                "unused-list",
                str(source.ignored[0].parent),
                f"{len(source.ignored)} lists belong to no "
                f"known split and were not used: {', '.join(p.name for p in source.ignored[:NAMED])}; "
                f"every XML file is in the train split; name them {', '.join(SPLITS[:3])}",
            )
        )
    if source.complete:
        issues += image_index.without({image.path for image in found})
    return RawSplit(class_infos(names), found, issues, listed=len(source.files))


class _ImageIndex:
    """The images of a split, by name and by stem.

    file_names   the <filename> of each annotation of the split
    """

    def __init__(self, folder: Path, file_names: list[str]) -> None:
        self.folder = folder
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in listing.images_in(folder):
            self.by_name[fold(path.name)].append(path)
            self.by_stem[fold(path.stem)].append(path)
        self.references = Counter(fold(PurePosixPath(name.replace("\\", "/")).name) for name in file_names)

    def of(self, file: Path, file_name: str, issues: list[DataIssue]) -> Path:
        """The image that an annotation file describes."""
        own = self._nearest(self.by_stem.get(fold(file.stem), []), file, file.stem)
        same_folder = [path for path in own if path.parent.name == file.parent.name]
        own = same_folder or own  # Annotations/a/1.xml describes JPEGImages/a/1.jpg, not b/1.jpg
        name = PurePosixPath(file_name.replace("\\", "/")).name
        named = self.by_name.get(fold(name), []) or self.by_stem.get(fold(name), [])
        if named and (self.references[fold(name)] == 1 or not own):
            return self._nearest(named, file, name)[0]
        if named and own and self.references[fold(name)] > 1 and own[0] != self._nearest(named, file, name)[0]:
            issues.append(
                DataIssue(
                    "filename-repeated",
                    str(file),
                    f"<filename> is {name!r} in "
                    f"{self.references[fold(name)]} files; {own[0].name}, which has this file's name, is used",
                )
            )
        if len(own) > 1:
            issues.append(
                DataIssue(
                    "same-name",
                    str(file),
                    f"{', '.join(path.name for path in own)}: its image is ambiguous; {own[0].name} is used",
                )
            )
        return own[0] if own else self.folder / (name or f"{file.stem}.jpg")

    def _nearest(self, found: list[Path], file: Path, name: str) -> list[Path]:
        """Sorted: the same sub-folder and the exact name first."""
        return sorted(found, key=lambda path: (path.parent.name != file.parent.name, path.name != name, path))

    def without(self, used: set[Path]) -> list[DataIssue]:
        unlisted = sorted(path for paths in self.by_name.values() for path in paths if path not in used)
        if not unlisted:
            return []
        return [
            DataIssue(
                "unlisted-image",
                str(self.folder),
                f"{len(unlisted)} images have no XML file and are left out: "
                f"{', '.join(path.name for path in unlisted[:NAMED])}{', ...' if len(unlisted) > NAMED else ''}",
            )
        ]


def _own_xml(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in children(folder) if path.suffix.lower() == ".xml" and os.path.isfile(path))


def _xml(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in listing.files(folder) if path.suffix.lower() == ".xml")


def _listed(annotations: Path, file: Path, annotated: tuple[Path, ...]) -> tuple[Path, ...]:
    """The annotation files that the lines of a list name: complete lines, because names may contain spaces."""
    there = {fold(path.relative_to(annotations).with_suffix("").as_posix()): path for path in annotated}
    found = []
    for line in filter(None, map(str.strip, read_text(file, DataError).splitlines())):
        name = line.replace("\\", "/")
        flagged = FLAGGED.fullmatch(name)
        bare = str(PurePosixPath(name).with_suffix("")) if name.lower().endswith(ENDINGS) else name
        spellings = [name, bare, flagged["name"] if flagged else name]
        # The last name also of PaddlePaddle's "JPEGImages/a.jpg Annotations/a.xml".
        spellings += [PurePosixPath(spelling).name for spelling in spellings]
        path = next((there[fold(spelling)] for spelling in spellings if fold(spelling) in there), None)
        if path is None and ("/" in name or "\0" in name):
            raise DataError(f"{file}: {line[:200]!r} is a path; expected names of files in {annotations.name}/")
        found.append(path or annotations / f"{name[:200]}.xml")
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
            found.update(_text(item, "name") for item in parse(path).findall("object"))
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
    item: ElementTree.Element, image: RawImage, index: dict[str, int], file: Path, issues: list[DataIssue]
) -> None:
    name = _text(item, "name")
    corners = numbers([_number(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")], 4)
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
                crowd=_text(item, "difficult").lower() in ("1", "true"),
                degrees=_degrees(item),
            )
        )


def _degrees(item: ElementTree.Element) -> float:
    """The angle that CVAT writes as an attribute beside the box before it is turned."""
    attributes = item.findall("attributes/attribute")
    return next((turn(_text(one, "value")) for one in attributes if _text(one, "name") == "rotation"), 0.0)
