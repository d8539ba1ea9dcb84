"""Read operators.json: which operators the parser of each TensorRT supports, with which types and limits.

Keys of an entry, all of them optional:
types       element types of its data, as the name of a group or a list; float64 is read as float32
refused     a type that is refused although `types` contains it
typed       the input that `types` applies to (default 0)
ranks       numbers of dimensions that its first input may have
inputs, outputs   how many of them the parser reads
attributes  name -> values that it may have (each number of a list)
absent      attributes that must be absent
constant    inputs that must be known when the engine is built
static      its first input must have fixed sizes
plugin      the plugin that must be loaded to read it
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("operators.json")
# Nodes of a quantized graph pass int8 on: the parser accepts it wherever it accepts integers.
_WITH_INT8 = {"int32", "int64"}


@dataclass(frozen=True)
class Operator:
    """One entry; `source` documents it. Empty fields set no limit."""

    source: str
    types: frozenset[str] = frozenset()
    typed: int = 0
    ranks: tuple[int, ...] = ()
    inputs: int | None = None
    outputs: int | None = None
    attributes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    constant: tuple[int, ...] = ()
    static: bool = False
    plugin: str = ""


@dataclass(frozen=True)
class OperatorTable:
    """The operators that one TensorRT supports, by name, and its first and last documented opset."""

    operators: dict[str, Operator]
    opsets: tuple[int, int]
    source: str


@cache
def operator_table(version: tuple[int, int], *, rtx: bool = False) -> OperatorTable:
    """The table of a TensorRT (major, minor); with `rtx` that of TensorRT-RTX 1.7."""
    raw = _raw()
    found: dict[str, Operator | None] = {}
    opsets, source = raw["opsets"], raw["source"]
    _take(found, raw["table"], raw["source"], raw["groups"])
    for change in raw["changes"]:
        if _release(change["release"]) <= version:
            _take(found, change["operators"], change["source"], raw["groups"])
            if "opsets" in change:
                opsets, source = change["opsets"], change["source"]
    if rtx:
        _take(found, raw["rtx-1.7"]["operators"], raw["rtx-1.7"]["source"], raw["groups"])
    known = {name: entry for name, entry in found.items() if entry is not None}
    return OperatorTable(known, (opsets[0], opsets[1]), source)


@cache
def supported_since(name: str) -> str:
    """The first release whose parser supports an operator, "" where none is known."""
    raw = _raw()
    if raw["table"].get(name) is not None:
        return str(raw["release"])
    return next((str(change["release"]) for change in raw["changes"] if change["operators"].get(name) is not None), "")


@cache
def _raw() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return raw


def _take(
    found: dict[str, Operator | None], entries: dict[str, Any], source: str, groups: dict[str, list[str]]
) -> None:
    for name, entry in entries.items():
        found[name] = None if entry is None else _operator(entry, source, groups)


def _operator(entry: dict[str, Any], source: str, groups: dict[str, list[str]]) -> Operator:
    keys = dict(entry)
    kinds, refused = keys.pop("types", []), set(keys.pop("refused", []))
    types = set(groups[kinds] if isinstance(kinds, str) else kinds)
    if types & _WITH_INT8:
        types.add("int8")
    if "float32" in types:
        types.add("float64")
    values = {name: tuple(allowed) for name, allowed in keys.pop("attributes", {}).items()}
    kept: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in keys.items()}
    unknown = set(kept) - {item.name for item in fields(Operator)}
    if unknown:
        raise ValueError(f"{FILE}: unknown keys {sorted(unknown)}")
    return Operator(source, frozenset(types - refused), attributes=values, **kept)


def _release(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
