"""Output of all commands: tables, messages and progress on standard error, data on standard output."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from edgedetr.cli._failures import writing_out
from edgedetr.printable import json_text, printable

if TYPE_CHECKING:
    from edgedetr.progress import Progress


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", err: bool = True) -> None:
    """A plain aligned table; numbers to the right, None as a dash.

    Rich's tables are not used: a device has no rich, and the same command must print the same table everywhere. Line
    ends and control characters in a cell are shown as escapes.
    """
    body = [["-" if value is None else printable(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *body]) for i in range(len(head))]
    right = [bool(body) and all(_number(line[i]) for line in body) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if flag else cell.ljust(width) for cell, width, flag in zip(cells, widths, right)
        ).rstrip()

    if title:
        click.echo(click.style(title, bold=True), err=err)
    click.echo(click.style(line(head), dim=True), err=err)
    for cells in body:
        click.echo(line(cells), err=err)


def as_json(value: object) -> None:
    """One JSON document on standard output; NaN and infinity, which JSON does not have, become null."""
    write_out(json_text(_finite(value), indent=1))


def write_out(text: str) -> None:
    """One piece of JSON on standard output; letters outside its encoding are written as JSON escapes."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    with writing_out():
        click.echo(text)


def say(text: str, *, fg: str | None = None) -> None:
    """Print a message for people on standard error; control characters are shown as escapes.

    fg   color of the whole text, in a terminal
    """
    safe = printable(text, lines=True)
    click.echo(click.style(safe, fg=fg) if fg else safe, err=True)


class SafeFormatter(logging.Formatter):
    """Log lines in which control characters are escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars on standard error, one for each step; plain lines where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield _plain_progress()
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=False) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report  # in a log file rich prints the finished bars only


def _plain_progress() -> Progress:
    tenths: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        step = 10 * done // total if total else 0
        if tenths.get(what) != step:
            tenths[what] = step
            say(f"{what}: {done}/{total}" if total else what)

    return report


def _number(text: str) -> bool:
    return text == "-" or text.lstrip("+-").replace(".", "", 1).rstrip("%").isdigit()


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
