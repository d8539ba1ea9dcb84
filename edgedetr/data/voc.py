"""Pascal VOC layout: Annotations/*.xml, JPEGImages/ (or images/), ImageSets/Main/<split>.txt; or <split>/*.xml.

Corners are read as x = xmin, width = xmax - xmin, as the usual converters do. `difficult` objects become crowd: a
detector may find them without gain or loss, as the VOC evaluation has it. Class names come from classes.txt, or sorted
from the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from edgedetr.data import images
from edgedetr.data.clean import RawImage, RawObject, RawSplit, class_infos, numbers
from edgedetr.data.form import Finding
from edgedetr.data.names import canonical
from edgedetr.errors import DataError, did_you_mean

MAX_XML_BYTES = 16 << 20        # a VOC file is a few kilobytes


@dataclass(frozen=True)
class Source:
    """A split: its annotation files and the folder of its pictures."""

    files: tuple[Path, ...]
    pictures: Path


def find(root: Path) -> dict[str, Source]:
    """Annotation files of each split; empty where this is no VOC layout."""
    found: dict[str, Source] = {}
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    texts, pictures = folders.get("annotations"), folders.get("jpegimages") or folders.get("images")
    if texts is not None and pictures is not None and any(texts.glob("*.xml")):
        for listing in sorted(root.glob("ImageSets/Main/*.txt")):
            split = canonical(listing.stem)
            if split in ("train", "val", "test", "trainval"):       # others are one class's: aeroplane_train.txt
                found[split] = Source(_listed(texts, listing), pictures)
        return found or {"train": Source(tuple(sorted(texts.glob("*.xml"))), pictures)}
    for folder in folders.values():
        files = tuple(sorted(folder.glob("*.xml")))
        if files:
            found[canonical(folder.name)] = Source(files, folder)
    return found


def count(root: Path, split: str, source: Source) -> int:
    """Images listed in a split."""
    return len(source.files)


def read(root: Path, split: str, source: Source) -> RawSplit:
    """Read the files of one split; image ids count from 1 in the split's order."""
    findings: list[Finding] = []
    names = _class_names(root)
    index = {name: position for position, name in enumerate(names)}
    pictures = {path.stem: path for path in sorted(source.pictures.iterdir()) if images.is_image(path)}
    found = []
    for position, file in enumerate(source.files, start=1):
        if not file.is_file():
            findings.append(Finding("missing-annotation", str(file), "listed in the split, but there is no such file",
                                    True))
            continue
        try:
            tree = parse(file)
        except DataError as error:
            findings.append(Finding("unreadable-annotation", str(file), str(error), True))
            continue
        image = RawImage(position, pictures.get(file.stem, source.pictures / f"{file.stem}.jpg"), _stated_size(tree))
        for thing in tree.findall("object"):
            _annotate(thing, image, index, file, findings)
        found.append(image)
    return RawSplit(class_infos(names), found, findings)


def parse(file: Path) -> ElementTree.Element:
    """The root element; a document type, and with it every entity, is refused before it is expanded."""
    if file.stat().st_size > MAX_XML_BYTES:
        raise DataError(f"{file}: {file.stat().st_size} bytes; expected a VOC file of at most {MAX_XML_BYTES}")
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise DataError(f"{file}: declares a document type or entities; expected plain VOC XML; remove the DOCTYPE")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(file.read_bytes(), True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as error:  # LookupError: an unknown encoding
        raise DataError(f"{file}: no whole XML ({error}); expected a VOC annotation") from error


def _listed(texts: Path, listing: Path) -> tuple[Path, ...]:
    stems = []
    for line in listing.read_text(encoding="utf-8-sig").splitlines():
        words = line.split()
        if words:
            if "/" in words[0] or "\\" in words[0]:
                raise DataError(f"{listing}: {words[0]!r} is a path; expected the bare names of files in {texts.name}/")
            stems.append(words[0])
    return tuple(texts / f"{stem}.xml" for stem in dict.fromkeys(stems))


def _class_names(root: Path) -> list[str]:
    listing = root / "classes.txt"
    if listing.is_file():
        names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not names or len(set(names)) != len(names):
            raise DataError(f"{listing}: {names[:20]}; expected class names, one a line, each once")
        return names
    found: set[str] = set()
    for source in find(root).values():
        for file in source.files:
            try:
                found.update(_text(thing, "name") for thing in parse(file).findall("object"))
            except (DataError, OSError):
                continue            # `read` names this file
    found.discard("")
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


def _annotate(thing: ElementTree.Element, image: RawImage, index: dict[str, int], file: Path,
              findings: list[Finding]) -> None:
    name = _text(thing, "name")
    corners = numbers([_number(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")], 4)
    if name not in index:
        findings.append(Finding("unknown-class", str(file),
                                f"object {name!r} is not in classes.txt{did_you_mean(name, index)}", True))
    elif corners is None:
        findings.append(Finding("bad-box", str(file), f"an object {name!r} has no bndbox of four finite numbers", True))
    else:
        image.objects.append(RawObject(index[name], (corners[0], corners[1], corners[2], corners[3]),
                                       crowd=_text(thing, "difficult") == "1"))
