"""The options of `edgedetr train` that are short names of recipe keys, in one table for options, checks and tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from edgedetr.cli._options import AdvancedOption
from edgedetr.errors import UsageError


class NumberOr(click.ParamType):
    """A whole number of at least 1, or one of a few words."""

    def __init__(self, *words: str) -> None:
        self.name, self._words = "number", words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self._words or isinstance(value, int):
            return value
        if isinstance(value, str) and value.isascii() and value.isdigit() and 1 <= len(value) < 10 and int(value) >= 1:
            return int(value)
        return self.fail(f"{value!r} is neither a whole number from 1 nor {' or '.join(self._words)}", param, ctx)


class ImageSize(click.ParamType):
    """`640` -> (640, 640), `480x640` -> (480, 640): height, width."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from edgedetr.image_size import parse_size

        if not isinstance(value, str):
            return value
        return parse_size(f"{value}x{value}" if value.strip().isdigit() else value, "--imgsz")


@dataclass(frozen=True)
class Word:
    """One option and the recipe keys that it sets, all to its value (a pair: one to each).

    option    as it is typed
    keys      section.key of the recipe
    type      how click reads the value
    metavar   how --help shows the value
    help      one line for --help
    advanced  listed at the end of --help
    """

    option: str
    keys: tuple[str, ...]
    type: click.ParamType
    metavar: str
    help: str
    advanced: bool = False

    @property
    def parameter(self) -> str:
        """The name under which click passes it to the command."""
        return self.option.removeprefix("--").replace("-", "_")

    def sets(self, value: Any) -> list[str]:
        """The value as `section.key=value`."""
        values = value if isinstance(value, tuple) else (value,) * len(self.keys)
        return [f"{key}={json.dumps(one)}" for key, one in zip(self.keys, values)]


WORDS = (
    Word("--epochs", ("train.epochs",), click.IntRange(1), "N", "Passes over the training images."),
    Word("--minutes", ("train.minutes",), click.FloatRange(0), "M", "Train no longer: fewer epochs where needed."),
    Word("--batch", ("train.batch",), NumberOr("auto"), "N|auto", "Images per step, over all devices."),
    Word("--imgsz", ("input.height", "input.width"), ImageSize(), "N|HxW", "Input size in pixels: 640 or 480x640."),
    Word("--lr", ("train.lr",), click.FloatRange(0, min_open=True), "RATE", "Learning rate."),
    Word("--teacher", ("train.teacher",), click.STRING, "NAME|BUNDLE", "A trained detector whose detections to learn."),
    Word(
        "--patience", ("train.patience",), click.IntRange(0), "N", "Stop after N evaluations without a better AP.", True
    ),
    Word("--workers", ("train.workers",), click.IntRange(0), "N", "Processes that prepare images.", True),
    Word("--seed", ("train.seed",), click.IntRange(0), "N", "Seed of all random numbers.", True),
)


def word_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options of WORDS, in the order of the table."""
    for word in reversed(WORDS):
        command = click.option(
            word.option,
            word.parameter,
            type=word.type,
            metavar=word.metavar,
            help=f"{word.help}  [{' and '.join(word.keys)}]",
            cls=AdvancedOption if word.advanced else click.Option,
        )(command)
    return command


def merge(given: Mapping[str, Any], sets: Iterable[str], others: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The values of --set, and those of the options of WORDS as if they were given with --set.

    given   by the name of the parameter; None = not given
    others  further options that set a key, and were given: key -> option

    Errors: UsageError where two of them set one key.
    """
    merged = tuple(sets)
    by = dict(others or {})
    for text in merged:
        key = text.partition("=")[0].strip()
        if key in by and by[key] != "--set":
            raise UsageError(f"{by[key]} and --set {key} both set {key}; keep one of them")
        by[key] = "--set"
    for word in WORDS:
        if (value := given[word.parameter]) is None:
            continue
        for key in word.keys:
            if key in by:
                raise UsageError(f"{word.option} and --set {key} both set {key}; keep one of them")
        merged += tuple(word.sets(value))
    return merged
