"""edgedetr verify: what each file of a bundle lost against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedetr.artifacts import BACKENDS
from edgedetr.cli._options import bundle_argument, data_option, json_option, open_bundle, threads_option
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.errors import NotWithinTolerance

if TYPE_CHECKING:
    pass


@click.command()
@bundle_argument
@data_option
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="AP",
    help="Largest accepted AP drop, points.  [default: the bundle's]",
)
@click.option("--live", is_flag=True, help="Run the PyTorch model again instead of reading its recorded detections.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Only these libraries; repeatable.  [default: the engines that fit this device, else those that run here]",
)
@threads_option
@json_option
def verify(
    bundle: Path | None,
    data: Path | None,
    max_drop: float | None,
    live: bool,
    backends: tuple[str, ...],
    threads: int | None,
    as_json_: bool,
) -> int:
    """Bound what each stage loses against PyTorch.

    On a device with engines these are verified, without PyTorch: at batch 1, in full batches of equal images, INT8
    beside FP16, and the precision that they really run in.

    Exit 3 when a delivered stage is not shown to be within the budget."""
    import edgedetr

    with progress_bars() as progress:
        verdict = edgedetr.verify(
            open_bundle(bundle),
            data=data,
            max_drop=max_drop,
            live=live,
            backends=backends or None,
            threads=threads,
            progress=progress,
        )
    from edgedetr.evaluation.engine_verdict import DeviceVerdict

    result = verdict.to_json()
    show_verdict(result)
    if isinstance(verdict, DeviceVerdict):
        show_engines(result)
    if as_json_:
        as_json(result)
    return 0 if result["passed"] else NotWithinTolerance.exit_code


def show_verdict(result: dict[str, Any]) -> None:
    """The closing table of verify and demo, and one line that says what it means; `result` is a Verdict as JSON."""
    from edgedetr.reporting.tables import stage_rows, verdict_sentence

    head, rows = stage_rows(result)
    table(head, rows)
    for stage in result["stages"]:
        if stage.get("note"):
            say(f"{stage['name']} ({stage['backend']}): {stage['note']}", fg="yellow")
    say(verdict_sentence(result), fg="green" if result["passed"] else "red")


def show_engines(result: dict[str, Any]) -> None:
    """What is only known of engines; `result` is a DeviceVerdict as JSON."""
    say(f"{result['device']}, TensorRT {result['tensorrt']}" + (f", {c}" if (c := result["conditions"]) else ""))
    engines = [stage for stage in result["stages"] if "engine" in stage]
    table(
        ["engine", "layers in its precision", "reformats", "equal rows"],
        [[e["engine"], _percent(e["share"]), e["reformats"], _percent(e["rows"])] for e in engines],
    )
    say(f"recommended: {result['recommended'] or 'none of them'}")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"
