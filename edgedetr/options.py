"""Checks configurations: type, allowed words and range of every field, for Python callers and for TOML alike.

A configuration dataclass calls `check` from `__post_init__`. A function that takes one of a few words calls `one_of`
before it uses the word, so that a misspelled word is an error and not the last choice.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgedetr.errors import EdgedetrError, RecipeError, did_you_mean

# Metadata of a field that is newer than 0.1 and whose default does what 0.1 did: `field(default=..., metadata=LATER)`.
# At its default it is not part of the fingerprint of a training, so that older checkpoints can be resumed.
LATER = {"later": True}


def later(as_before: object) -> dict[str, object]:
    """Metadata of a field that is newer than 0.1 and whose default does something else than 0.1 did.

    as_before  the value that does what 0.1 did; with it, the field is not part of the fingerprint of a training
    """
    return {**LATER, "as_before": as_before}


def renamed(was: str) -> dict[str, object]:
    """Metadata of a field whose recipe key had the name `was` in 0.1: that name is still read, with a warning.

    The fingerprint of a training keeps the old name, so that older checkpoints can be resumed.
    """
    return {"was": was}


Range = tuple[float, float]  # smallest and largest value; math.inf for "no limit", and never NaN or infinity itself
_recorded: ContextVar[dict[str, Range] | None] = ContextVar("recorded", default=None)  # see `ranges_of`


def check(config: Any, section: str, ranges: Mapping[str, Range] | None = None) -> None:
    """Check the type, the allowed words (Literal) and the range of every field of a frozen dataclass.

    section  the first part of names in messages: "train" for train.lr
    ranges   by field name; for a tuple, of each number; names of fields that the class does not have are ignored

    Errors: RecipeError that names the field, what it is and what was expected.
    """
    if (recorded := _recorded.get()) is not None:
        recorded.update(ranges or {})
    kind: Any = type(config)
    hints = _hints(kind)
    for item in fields(config):
        name, value = f"{section}.{item.name}", getattr(config, item.name)
        _typed(name, value, hints[item.name])
        low, high = (ranges or {}).get(item.name, (-math.inf, math.inf))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, Real) and not isinstance(number, bool):
                within(name, number, low, high)


def ranges_of(config_class: Any) -> dict[str, Range]:
    """The ranges that `check` holds the fields of a configuration class to, by field name: for documentation."""
    token = _recorded.set({})
    try:
        config_class()
        return dict(_recorded.get() or {})
    finally:
        _recorded.reset(token)


def one_of(name: str, value: object, words: Iterable[object], error: type[EdgedetrError] = RecipeError) -> None:
    """Errors: `error` with the nearest word, where `value` is not one of `words`."""
    known = list(words)
    if not any(type(value) is type(word) and value == word for word in known):
        near = did_you_mean(value, [word for word in known if isinstance(word, str)]) if isinstance(value, str) else ""
        raise error(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}{near}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """Errors: RecipeError where a number is NaN, infinite, or not from `low` to `high`."""
    if not isinstance(value, Integral) and not math.isfinite(value):
        raise RecipeError(f"{name} is {value}; expected a finite number")
    if not low <= value <= high:
        shown = str(value) if abs(value) < 10**12 else f"about 10^{int(abs(int(value)).bit_length() * 0.30103)}"
        expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise RecipeError(f"{name} is {shown}; expected {expected}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(name: str, value: object, hint: Any) -> None:
    """Errors: RecipeError where a value is not of an annotated type."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        one_of(name, value, inside)
    elif origin in (Union, types.UnionType):
        if value is not None or type(None) not in inside:
            _typed_union(name, value, [kind for kind in inside if kind is not type(None)])
    elif origin is tuple:
        many = len(inside) == 2 and inside[1] is Ellipsis
        if not isinstance(value, tuple) or (not many and len(value) != len(inside)):
            expected = "a tuple" if many else f"a tuple of {len(inside)}"
            raise RecipeError(f"{name} is {value!r}; expected {expected}")
        for item, kind in zip(value, [inside[0]] * len(value) if many else inside):
            _typed(name, item, kind)
    elif hint in KINDS:
        kind, words = KINDS[hint]
        if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
            raise RecipeError(f"{name} is {value!r}; expected {words}")
    else:
        raise TypeError(f"{name} is annotated {hint}, which `check` does not support")


def _typed_union(name: str, value: object, kinds: list[Any]) -> None:
    """A value of one of several types: of the only one, or a word ("auto") in place of a number or a list."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    other = next(kind for kind in kinds if get_origin(kind) is not Literal)
    if words and isinstance(value, str):
        if value not in words:
            expected = f"{KINDS[other][1] if other in KINDS else 'a list of numbers'} or {words[0]!r}"
            raise RecipeError(f"{name} is {value!r}; expected {expected}{did_you_mean(value, words)}")
    else:
        _typed(name, value, other)


KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}
