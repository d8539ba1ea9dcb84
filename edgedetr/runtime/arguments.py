"""Checks of arguments from Python callers: a wrong one is a UsageError with the given and the expected value."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import TypeGuard, cast

from edgedetr.errors import UsageError, did_you_mean
from edgedetr.printable import shown


def check_count(number: object, what: str, most: int | None = None) -> None:
    """UsageError unless it is None or a whole number of at least 1, and of at most `most`."""
    fits = is_whole(number) and number >= 1 and (most is None or number <= most)
    if number is not None and not fits:
        limit = f"from 1 to {most}" if most is not None else "of at least 1"
        raise UsageError(f"{what} is {shown(number)}; expected a whole number {limit}")


def check_word(word: object, known: Iterable[str], what: str) -> None:
    """UsageError with the nearest word unless it is one of `known`."""
    known = list(known)
    if not isinstance(word, str) or word not in known:
        near = did_you_mean(word[:60], known) if isinstance(word, str) else ""
        raise UsageError(f"{what} is {shown(word)}; expected one of {', '.join(known)}{near}")


def check_text(text: object, what: str, expected: str) -> None:
    """UsageError unless it is text."""
    if not isinstance(text, str):
        raise UsageError(f"{what} is {shown(text)}; expected {expected}")


def check_fraction(number: object, what: str) -> None:
    """UsageError unless it is a number from 0 to 1."""
    fits = isinstance(number, Real) and not isinstance(number, bool) and 0 <= cast(float, number) <= 1
    if not fits:
        raise UsageError(f"{what} is {shown(number)}; expected a number from 0 to 1")


def as_path(value: object, what: str, expected: str = "a path") -> Path:
    """The value as a Path. Errors: UsageError for another type."""
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} is {kind(value)}; expected {expected}")
    return Path(value)


def check_texts(texts: object, what: str, expected: str) -> None:
    """UsageError unless it is a list or tuple of texts."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{what} is {shown(texts)}; expected {expected}")


def is_whole(number: object) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are not."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def kind(value: object) -> str:
    """The type of a value, for messages: "None" or "of type str"."""
    return "None" if value is None else f"of type {type(value).__name__}"
