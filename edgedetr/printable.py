"""Names that others chose, written where they can do no harm: terminals, logs, JSON lines, configuration files.

A class may be called anything. Control characters move the cursor, color or hide text and answer terminals' questions;
marks of direction let `a` look like `b`; line ends begin lines that nobody wrote; halves of surrogate pairs, from file
names that are not UTF-8, cannot be encoded at all. All of them are shown as escapes, as Python writes them.
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
    # A raw line feed stands between values alone: in a string it is escaped.
    return "".join(json.dumps(c)[1:-1] if _unsafe(c) and c != "\n" else c for c in text).replace("\x7f", "\\u007f")


def _unsafe(character: str) -> bool:
    return unicodedata.category(character) in UNSAFE and character not in JOINERS


def _escaped(character: str) -> str:
    if character in SHORT:
        return SHORT[character]
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
