"""The small part of YAML that YOLO's data.yaml uses: top-level scalars, lists and one-level mappings, read as text.

Block and flow form, quotes and comments are understood; deeper nesting and text blocks (download scripts) are passed
over.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgedetr.errors import DataError

Value = str | list[str] | dict[str, str]

_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'"
_KEY = re.compile(rf"^(?P<key>{_QUOTED}|[^\s#'\"\[\]{{}}:-][^:]*?)\s*:(?:\s+(?P<rest>.*))?$")
_ITEM = re.compile(rf"\s*(?P<item>{_QUOTED}|[^,\[\]{{}}'\"]*)\s*(?:,|$)")

_PAIR = re.compile(rf"\s*((?:{_QUOTED}|[^,\[\]{{}}'\"])*)\s*(?:,|$)")


def read(file: Path) -> dict[str, Value]:
    """The top-level keys of a data.yaml; DataError with the line where it is not understood."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); expected YAML with names, train and val") from error
    found: dict[str, Value] = {}
    position = 0
    while position < len(lines):
        line = _bare(lines[position])
        start, position = position + 1, position + 1
        if not line.strip() or line in ("---", "..."):
            continue
        match = _KEY.match(line)
        if match is None:
            raise DataError(f"{file}, line {start}: {line[:60]!r}; expected 'key: value' as in 'names: [cat, dog]'")
        key, rest = unquote(match["key"]), (match["rest"] or "").strip()
        if key in found:
            raise DataError(f"{file}, line {start}: {key!r} stands twice; expected each key once")
        if rest[:1] in ("[", "{"):
            close = {"[": "]", "{": "}"}[rest[0]]
            while not rest.endswith(close) and position < len(lines):
                rest += " " + _bare(lines[position]).strip()
                position += 1
            if not rest.endswith(close):
                raise DataError(f"{file}, line {start}: {rest[:60]!r} is not closed; expected {close!r}")
            found[key] = _flow(rest, file, start)
        elif rest and rest[0] not in "|>":
            found[key] = unquote(rest)
        else:
            block = []
            while position < len(lines) and (not lines[position].strip() or lines[position][:1] in " \t#"
                                             or lines[position].startswith("- ")):
                block.append(_bare(lines[position]))
                position += 1
            found[key] = "" if rest else _block([text for text in block if text.strip()])
    return found


def unquote(text: str) -> str:
    """A scalar without its quotes."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'") if text[0] == "'" else re.sub(r"\\(.)", r"\1", text[1:-1])
    return text


def _bare(line: str) -> str:
    """The line without its comment and trailing space."""
    quote = ""
    for position, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter if position == 0 or not line[position - 1].isalnum() else ""   # an apostrophe inside a word
        elif letter == "#" and (position == 0 or line[position - 1].isspace()):
            return line[:position].rstrip()
    return line.rstrip()


def _flow(text: str, file: Path, line: int) -> Value:
    items, position, inner = [], 0, text[1:-1].strip()
    while position < len(inner):
        match = (_ITEM if text[0] == "[" else _PAIR).match(inner, position)
        if match is None or match.end() == position:
            raise DataError(f"{file}, line {line}: {text[:60]!r}; expected a flat list or mapping")
        items.append(match[1])
        position = match.end()
    if text[0] == "[":
        return [unquote(item) for item in items]
    return _mapping(items)


def _block(lines: list[str]) -> Value:
    depth = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    rows = [line.strip() for line in lines if len(line) - len(line.lstrip()) == depth]
    if rows and all(row.startswith("- ") for row in rows):
        return [unquote(row[2:]) for row in rows]
    return _mapping(rows)


def _mapping(rows: list[str]) -> dict[str, str]:
    pairs = (row.partition(":") for row in rows if ":" in row)
    return {unquote(key): unquote(value) for key, _, value in pairs}
