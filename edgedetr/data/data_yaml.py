"""Read YOLO's data.yaml with PyYAML's parser; all scalars stay text (class names may be "no" or 1e3).

The values are built here from the parser's events, not by a PyYAML loader, because the file may come from a stranger:
its loaders recurse without a limit, keep the last of repeated keys, and expand aliases of aliases, whose text can be
gigabytes. Here nesting is bounded, repeated keys are errors, an alias repeats a text or a flat list, and tags have no
effect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedetr.errors import DataError, MissingDependency
from edgedetr.packages import missing
from edgedetr.storage.reading import read_text

Value = str | list[Any] | dict[str, Any]

LIMIT = 1 << 20  # bytes; 20,000 class names take about 400 kB
DEPTH = 20  # levels of lists and mappings
EXPECTED = "expected YAML like 'names: [cat, dog]' and 'train: images/train'"


def read(file: Path) -> dict[str, Value]:
    """The mapping in a data.yaml; scalars are text, an empty one is "".

    Errors: DataError with file and line where it is not YAML, not a mapping, or repeats a key; MissingDependency.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency(f"{file} cannot be read: {missing('yaml', error)}") from error
    text = read_text(file, DataError, limit=LIMIT)
    try:
        found = _Builder(file).build(yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: \U00110000
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise DataError(f"{file}{line}: not YAML ({what}); {EXPECTED}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}, line 1: holds {str(found)[:60]!r}; {EXPECTED}")
    return found


class _Builder:
    """Values from a stream of YAML events, without recursion."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.open: list[Any] = []  # lists and mappings that are not closed yet
        self.keys: list[str | None] = []  # for each of `open`: the key of a mapping whose value is next
        self.anchors: dict[str, Value] = {}
        self.root: Value | None = None

    def build(self, events: Any) -> Value | None:
        """The first document."""
        for event in events:
            line, kind = event.start_mark.line + 1, type(event).__name__
            if kind == "DocumentEndEvent":
                break
            if kind in ("SequenceEndEvent", "MappingEndEvent"):
                self.open.pop()
                self.keys.pop()
            elif kind == "AliasEvent":
                if event.anchor not in self.anchors:
                    raise DataError(f"{self.file}, line {line}: there is no anchor &{event.anchor}; {EXPECTED}")
                again = self.anchors[event.anchor]
                # Aliases of lists of lists can turn a kilobyte into gigabytes of text.
                if not isinstance(again, str) and not all(
                    isinstance(item, str) for item in (again.values() if isinstance(again, dict) else again)
                ):
                    raise DataError(f"{self.file}, line {line}: *{event.anchor} repeats a list of lists; {EXPECTED}")
                self._put(again, line)
            elif kind in ("ScalarEvent", "SequenceStartEvent", "MappingStartEvent"):
                value: Value = event.value if kind == "ScalarEvent" else [] if kind == "SequenceStartEvent" else {}
                if event.anchor:
                    self.anchors[event.anchor] = value
                self._put(value, line)
                if not isinstance(value, str):
                    if len(self.open) >= DEPTH:
                        raise DataError(f"{self.file}, line {line}: nested more than {DEPTH} deep; {EXPECTED}")
                    self.open.append(value)
                    self.keys.append(None)
        return self.root

    def _put(self, value: Value, line: int) -> None:
        if not self.open:
            self.root = value
        elif isinstance(self.open[-1], list):
            self.open[-1].append(value)
        elif self.keys[-1] is None:
            if not isinstance(value, str):
                raise DataError(f"{self.file}, line {line}: a list or mapping as a key; {EXPECTED}")
            if value in self.open[-1]:
                raise DataError(f"{self.file}, line {line}: the key {value!r} is repeated; expected each key once")
            self.keys[-1] = value
        else:
            self.open[-1][self.keys[-1]] = value
            self.keys[-1] = None
