"""Read XML of the VOC layout within limits: no document type, no entities, bounded size, depth and elements."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from edgedetr.errors import DataError
from edgedetr.storage.reading import MARKS, read_bytes

MAX_XML_BYTES = 4 << 20  # a VOC file is a few kilobytes
MAX_DEPTH = 32
MAX_ELEMENTS = 200_000  # about 13 per object
DECLARED = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")
# Text encodings that tools declare; Python has others that are not text, or whose decoding grows without bound.
TEXT = ("ascii", "utf", "iso8859", "cp", "gb", "big5", "shift", "euc", "koi8", "johab", "mac")


def parse(file: Path) -> ElementTree.Element:
    """The root element. A document type, and with it every entity, is refused before it is expanded.

    Errors: DataError with the file name, and with the encoding where it is the problem.
    """
    content = _text(file, read_bytes(file, DataError, limit=MAX_XML_BYTES, fix="expected a VOC file"))
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate("utf-8")  # independent of the file's declaration: it is decoded above
    depth = elements = 0

    def refuse(*_: object) -> None:
        raise DataError(f"{file}: declares a document type or entities; expected plain VOC XML; remove the DOCTYPE")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > MAX_DEPTH or elements > MAX_ELEMENTS:
            raise DataError(f"{file}: more than {MAX_DEPTH} levels or {MAX_ELEMENTS} elements; expected a VOC file")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content.encode("utf-8", "strict"), True)
        root = builder.close()
    except (expat.ExpatError, ValueError, AssertionError) as error:  # ValueError: lone surrogates
        raise DataError(f"{file}: not complete XML ({error}); expected a VOC annotation") from error
    if root.tag.rpartition(":")[2].lower() != "annotation":
        cvat = root.tag == "annotations"
        other = "; this is CVAT's own format: export the task as COCO 1.0 or PASCAL VOC" if cvat else ""
        raise DataError(f"{file}: begins with <{root.tag[:40]}>; expected <annotation>, as in VOC files{other}")
    return root


def _text(file: Path, raw: bytes) -> str:
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "")
    declared = DECLARED.match(raw)
    if not encoding:
        encoding = declared[1].decode("ascii") if declared else "utf-8"
        # Without a byte order mark, UTF-16 is visible in its first letter.
        encoding = {b"<\0": "utf-16-le", b"\0<": "utf-16-be"}.get(raw[:2], encoding)
    try:
        name = codecs.lookup(encoding).name.replace("-", "").replace("_", "")
        if not name.startswith(TEXT) or name.startswith("utf7"):
            raise LookupError(f"{encoding} is not a text encoding")
        return raw.decode(encoding)
    except LookupError as error:
        raise DataError(
            f"{file}: not complete XML (the declared encoding {encoding[:40]!r} is unknown); save it as UTF-8"
        ) from error
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        raise DataError(
            f"{file}: not complete XML (not {encoding} text: byte {at} is 0x{raw[at : at + 1].hex() or '??'}); "
            "save it as UTF-8"
        ) from error
