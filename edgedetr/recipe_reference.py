"""Writes docs/recipe-keys.md: every key of a recipe with its default, its values, and the reason in the source.

Everything is read from the configuration classes: type and default from the fields, ranges from `options.check`, and
reasons from the comments beside the fields. `make docs` writes the page; a test fails where it is not up to date.
"""

from __future__ import annotations

import ast
import inspect
import io
import math
import re
import textwrap
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgedetr.models import FAMILY
from edgedetr.options import Range, ranges_of
from edgedetr.recipe import Recipe

UNLIMITED = 1e9  # a limit from here on only catches typing errors
PAGE = Path("docs/recipe-keys.md")  # in a checkout
INTRODUCTION = """\
# All keys of a recipe

A recipe is a TOML file with the sections below. A key that is left out has its default. One value is changed on the
command line by `--set section.key=value`, for example `--set train.lr=2e-4`, and in Python by `sets=["train.lr=2e-4"]`.
An unknown key is an error that names the nearest one. `make docs` writes this page from the source, whose comments give
the reasons.
"""


@dataclass(frozen=True)
class Key:
    """One key: its name, default and values as text, and the reason for the default."""

    name: str
    default: str
    values: str
    reason: str


def page() -> str:
    """The text of docs/recipe-keys.md."""
    return "\n".join([INTRODUCTION, *_model_section(), *_other_sections()]).rstrip() + "\n"


def keys_of(config_class: Any, names: set[str] | None = None, ranges: Mapping[str, Range] | None = None) -> list[Key]:
    """The keys of one configuration class, in the order of the source.

    names    only these; None = all
    ranges   smallest and largest values by key; None = those that the class itself checks
    """
    hints, reasons = get_type_hints(config_class), _reasons(config_class)
    ranges = ranges_of(config_class) if ranges is None else ranges
    return [
        Key(
            item.name,
            _toml(_default(item)),
            _values(hints[item.name], ranges.get(item.name)),
            reasons.get(item.name, "") + _meanings(item) + _older_name(item),
        )
        for item in fields(config_class)
        if item.init and (names is None or item.name in names)
    ]


def _model_section() -> Iterator[str]:
    """What the configurations of members share first, then each member's own keys and defaults."""
    yield "## [model]\n"
    yield f"`name` chooses the member: {_code(FAMILY)}. The other keys depend on the member.\n"
    users: dict[Any, list[str]] = {}
    for name, member in FAMILY.items():
        for part in reversed([part for part in member.config.__mro__ if is_dataclass(part)]):
            users.setdefault(part, []).append(name)
    tables: dict[tuple[str, ...], list[Key]] = {}
    for part, names in users.items():
        own = set(vars(part).get("__annotations__", {}))
        tables.setdefault(tuple(names), []).extend(keys_of(part, own, ranges_of(FAMILY[names[0]].config)))
    for of, listed in sorted(tables.items(), key=lambda item: -len(item[0])):
        yield f"### Keys of {'every member' if len(of) == len(FAMILY) else _code(of)}\n"
        yield from _table(listed)


def _other_sections() -> Iterator[str]:
    for section in fields(Recipe):
        if section.name != "model":
            yield f"## [{section.name}]\n"
            yield f"{_first_line(section.default_factory)}\n"
            yield from _table(keys_of(section.default_factory))


def _table(listed: list[Key]) -> Iterator[str]:
    yield "| key | default | values | reason |\n|---|---|---|---|"
    for key in listed:
        yield "| " + " | ".join([f"`{key.name}`", f"`{key.default}`", key.values, _cell(key.reason)]) + " |"
    yield ""


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _first_line(kind: Any) -> str:
    return (inspect.getdoc(kind) or "").split("\n", 1)[0]


def _default(item: Field[Any]) -> object:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _toml(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _values(hint: Any, limits: Range | None) -> str:
    """What a key accepts, in words: "whole number, 1 to 65536"; "`linear`, `exponential`"."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{_toml(word)}`" for word in inside)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in inside if kind is not type(None)]
        rest = ", or not set" if len(kinds) < len(inside) else ""
        return (
            ", or ".join(_values(kind, limits) for kind in sorted(kinds, key=lambda kind: get_origin(kind) is Literal))
            + rest
        )
    if origin is tuple:
        many = len(inside) == 2 and inside[1] is Ellipsis
        return f"list of {'any length' if many else len(inside)}: {_values(inside[0], limits)}"
    words = {bool: "true, false", int: "whole number", float: "number", str: "text"}[hint]
    return words if limits is None or hint in (bool, str) else f"{words}, {_range(*limits)}"


def _range(low: float, high: float) -> str:
    if high == math.nextafter(1, 0):
        return f"{low:g} to less than 1"
    return f"at least {low:g}" if high >= UNLIMITED else f"{low:g} to {high:g}"


def _meanings(item: Field[Any]) -> str:
    """What each word that the key accepts does, where the field's metadata has it under "words"."""
    return "".join(f"; `{word}`: {meaning}" for word, meaning in item.metadata.get("words", {}).items())


def _older_name(item: Field[Any]) -> str:
    return f" (named `{item.metadata['was']}` in 0.1)" if "was" in item.metadata else ""


def _reasons(config_class: Any) -> dict[str, str]:
    """The comment of each field: on its lines, above it, or going on below it (not with a capital)."""
    found: dict[str, str] = {}
    for part in reversed([part for part in config_class.__mro__ if is_dataclass(part)]):
        found.update(_reasons_of_one(part))
    return found


def _reasons_of_one(config_class: Any) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(config_class))
    comments, alone = _comments(source)
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    above, before, previous = "", 0, ""
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            above, before, previous = "", node.end_lineno or 0, ""
            continue
        above = ""
        for line in range(before + 1, node.lineno):
            if line in alone and (above or not previous or comments[line][:1].isupper()):
                above = f"{above} {comments[line]}".strip()
            elif line in alone:
                found[previous] = f"{found[previous]} {comments[line]}"
        own = " ".join(comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments)
        found[node.target.id] = _sentence(above, own)
        before, previous = node.end_lineno or 0, node.target.id
    return found


def _sentence(above: str, own: str) -> str:
    return f"{above}{';' if above and own and above[-1] not in '.;:' else ''} {own}".strip()


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    """Comments by line, and the lines that hold nothing else."""
    found: dict[int, str] = {}
    alone = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:"):
            line = token.start[0]
            found[line] = re.sub(r"^#\s*", "", token.string)
            if not token.line[: token.start[1]].strip():
                alone.add(line)
    return found, alone


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
