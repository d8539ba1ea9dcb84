"""The options of `edgedetr train` that are short names of recipe keys, in one table for options, checks and tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from edgedetr.cli._options import AdvancedOption
from edgedetr.errors import UsageError


class NumberOrAuto(click.ParamType):
    """A number from `least` on, or the word auto: the training chooses (training/fine_tuning.py).

    whole   without a fraction; a number that is not must be more than `least`
    """

    name = "number"

    def __init__(self, least: int = 0, *, whole: bool = True) -> None:
        self._least, self._whole = least, whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or not isinstance(value, str):
            return value
        try:
            number = int(value) if self._whole else float(value)
        except ValueError:
            number = None
        if number is None or not (number >= self._least if self._whole else self._least < number < math.inf):
            kind = f"a whole number from {self._least} on" if self._whole else f"a number above {self._least}"
            return self.fail(f"{value[:40]!r} is neither {kind} nor auto", param, ctx)
        return number


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
    Word("--epochs", ("train.epochs",), NumberOrAuto(1), "N|auto", "Passes over the training images."),
    Word("--minutes", ("train.minutes",), click.FloatRange(0), "M", "Train no longer: fewer epochs where needed."),
    Word("--batch", ("train.batch",), NumberOrAuto(1), "N|auto", "Images per step, over all devices."),
    Word("--imgsz", ("input.height", "input.width"), ImageSize(), "N|HxW", "Input size in pixels: 640 or 480x640."),
    Word("--lr", ("train.lr",), NumberOrAuto(whole=False), "RATE|auto", "Learning rate."),
    Word("--teacher", ("train.teacher",), click.STRING, "NAME|BUNDLE", "A trained detector whose detections to learn."),
    Word(
        "--patience",
        ("train.patience",),
        NumberOrAuto(),
        "N|auto",
        "Evaluations without a better AP before it stops.",
        True,
    ),
    Word("--workers", ("train.workers",), NumberOrAuto(), "N|auto", "Processes that prepare images.", True),
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
