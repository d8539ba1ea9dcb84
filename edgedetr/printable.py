"""Makes text of unknown origin safe for terminals, logs, JSON lines and configuration files.

A class can have any name. Control characters move the cursor, and color or hide text; marks of direction let `a` look
like `b`; line ends begin new lines; halves of surrogate pairs, from file names that are not UTF-8, cannot be encoded.
All of them are written as Python's escapes.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

# Categories of Unicode: controls, invisible formats, surrogates, private use, separators of lines and paragraphs.
UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
JOINERS = "\u200c\u200d"  # needed to write Persian, Hindi and others; they move nothing
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: object, *, lines: bool = False) -> str:
    """The text with unsafe characters as escapes: `\\x1b`, `\\u202e`.

    lines   keep line feeds, for messages of several lines
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _unsafe(c) and not (lines and c == "\n") else c for c in text)


def one_line(name: object) -> str:
    """A name for a field of a text file: white space of any kind is one space, `?` where nothing is left."""
    return printable(" ".join(str(name).split())) or "?"


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that may go to a terminal: letters of all scripts as they are, unsafe characters as JSON's own escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.isascii() and "\x7f" not in text:  # all else below a space is escaped by now
        return text
    # A raw line feed is only between values: in a string it is escaped.
    return "".join(json.dumps(c)[1:-1] if _unsafe(c) and c != "\n" else c for c in text).replace("\x7f", "\\u007f")


def shown(value: object, most: int = 60) -> str:
    """A value for a message: as Python writes it, in ASCII, cut at `most` characters; huge numbers by their size."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of more than 4300 digits, or one inside; nested too deep
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value too large to show"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _unsafe(character: str) -> bool:
    return unicodedata.category(character) in UNSAFE and character not in JOINERS


def _escaped(character: str) -> str:
    if character in SHORT:
        return SHORT[character]
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
