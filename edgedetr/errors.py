"""Errors for users: each message says what happened, what was expected and the next command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 10_000  # characters of a message; a longer one quotes a damaged file, and only its ends help


class EdgedetrError(Exception):
    """Base of every expected failure; `exit_code` is what the command line returns.

    A message of more than LONGEST characters loses its middle.
    """

    exit_code = 1

    def __init__(self, message: object = "", *others: object) -> None:
        text = str(message)
        if len(text) > LONGEST:
            half = LONGEST // 2
            message = f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"
        super().__init__(message, *others)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, at most 300 characters, to quote it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


class UsageError(EdgedetrError):
    """Wrong arguments of a command or a function."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or a `--set` has an unknown key, a wrong type or a value out of range."""


class DataError(EdgedetrError):
    """A data set, annotation or image cannot be used."""


class BundleError(EdgedetrError):
    """A file of a bundle is missing, stale or damaged."""


class ModelError(EdgedetrError):
    """Weights do not fit the model, or a model cannot be built with these settings."""


class TrainingError(EdgedetrError):
    """Training cannot go on (NaN loss, unusable checkpoint)."""


class ExportError(EdgedetrError):
    """A graph could not be exported or quantized."""


class DeviceError(EdgedetrError):
    """The GPU, its driver or its libraries are missing or do not work."""


class EngineError(EdgedetrError):
    """A TensorRT engine could not be built, or must not be loaded here."""


class MissingDependency(EdgedetrError):
    """An optional package is needed; the message names the extra to install."""


class NotWithinTolerance(EdgedetrError):
    """Verified, and not within the tolerance."""

    exit_code = 3


class PreparedNotFinished(EdgedetrError):
    """Everything that can be done here was done, the rest runs on the device, and --strict asks for an error."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'images'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
