"""edgedetr data: checks a data set."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import expect, json_option
from edgedetr.cli._output import as_json, progress_bars, say
from edgedetr.printable import printable


@click.group()
def data() -> None:
    """Check a data set (edgedetr data check DIR)."""


@data.command()
@click.argument("directory", type=click.Path(path_type=Path), callback=expect("data"))
@click.option("--strict", is_flag=True, help="Exit code 1 if anything had to be left out.")
@json_option
def check(directory: Path, strict: bool, as_json_: bool) -> int:
    """Print splits, classes, box sizes, and every problem of a data set.

    Exit code 1 if no split can be used."""
    from edgedetr.data.check import check as run

    with progress_bars() as progress:
        found = run(directory, progress=lambda done, total: progress("check", done, total))
    for line in found.lines():
        say(printable(line))
    if as_json_:
        as_json(found.to_json())
    if not found.splits:
        say(f"{directory}: no split can be used")
        return 1
    return 1 if strict and found.fatal else 0
