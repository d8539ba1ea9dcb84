"""edgedetr verify: measures the AP that each file of a bundle loses against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgedetr.artifacts import BACKENDS
from edgedetr.cli._options import (
    advanced_option,
    bundle_argument,
    command,
    data_option,
    json_option,
    open_bundle,
    threads_option,
)
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.errors import NotWithinTolerance

if TYPE_CHECKING:
    from edgedetr.evaluation.verdict import DeviceVerdict, Verdict
    from edgedetr.quantization.localize import Localization


@command()
@bundle_argument
@data_option
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="AP",
    help="Largest accepted loss of AP, in points of 0 to 100.  [default: the bundle's]",
)
@advanced_option("--live", is_flag=True, help="Run the PyTorch model again instead of reading its recorded detections.")
@click.option(
    "--localize",
    is_flag=True,
    help="Say where INT8 goes wrong: the first bad node of each file and library, what is known of it, and the cure.",
)
@advanced_option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Only these libraries; repeatable.  [default: engines of this device, else what is installed]",
)
@threads_option
@json_option
def verify(
    bundle: Path | None,
    data: Path | None,
    max_drop: float | None,
    live: bool,
    localize: bool,
    backends: tuple[str, ...],
    threads: int | None,
    as_json_: bool,
) -> int:
    """Measure the AP that each file loses against PyTorch.

    For each file it reports the AP lost, and the worst loss to expect at 95 % confidence. On a device with engines, the
    engines are verified, without PyTorch: with single images and full batches, INT8 against FP16, and the precision
    that their layers really run in.

    Exit code 3 if we cannot prove that every file loses at most --max-drop."""
    import edgedetr

    opened = open_bundle(bundle)
    with progress_bars() as progress:
        verdict = edgedetr.verify(
            opened,
            data=data,
            max_drop=max_drop,
            live=live,
            backends=backends or None,
            threads=threads,
            progress=progress,
        )
        found = None
        if localize:
            from edgedetr.api import localize as search

            found = search(opened, data=data, backends=backends or None, threads=threads, progress=progress)
    from edgedetr.evaluation.verdict import DeviceVerdict

    show_verdict(verdict)
    if isinstance(verdict, DeviceVerdict):
        show_engines(verdict)
    if found is not None:
        show_localization(found)
    if as_json_:
        as_json({**verdict.to_json(), **({"localized": found.to_json()} if found else {})})
    return 0 if verdict.passed else NotWithinTolerance.exit_code


def show_verdict(verdict: Verdict) -> None:
    """The closing table of verify and demo, the notes, and one sentence with the result."""
    from edgedetr.reporting.tables import artifact_rows, integer_lines, notes, verdict_sentence

    head, rows = artifact_rows(verdict)
    table(head, rows)
    for line in integer_lines(verdict):
        say(line)
    for note in notes(verdict):
        say(note, fg="yellow")
    say(verdict_sentence(verdict), fg="green" if verdict.passed else "red")


def show_engines(verdict: DeviceVerdict) -> None:
    """What is measured of engines only."""
    environment = f", {verdict.environment}" if verdict.environment else ""
    say(f"{verdict.device}, TensorRT {verdict.tensorrt}{environment}")
    table(
        ["engine", "layers in its precision", "reformats", "equal rows"],
        [[e.engine, _percent(e.precision_fraction), e.reformats, _percent(e.rows_matched)] for e in verdict.engines],
    )
    say(f"recommended: {verdict.recommended or 'none of them'}")


def show_localization(found: Localization) -> None:
    """What was looked at, and each node at which INT8 goes wrong."""
    for line in found.checked:
        say(line)
    for finding in found.findings:
        say(str(finding), fg="yellow")


def _percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.0f} %"
