"""edgedetr sensitivity: ranks the layers by what INT8 in them alone does to the detections."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgedetr.cli._options import bundle_argument, command, expect, json_option, open_bundle, sets_option
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.storage.atomic import atomic_write

if TYPE_CHECKING:
    from edgedetr.quantization.sensitivity import SensitivityResult

SHOWN = 20  # rows of the table without --all


@command()
@bundle_argument
@click.option("--images", type=click.IntRange(1), help="At most so many images to compare on.  [default: 64]")
@click.option(
    "--level",
    type=click.Choice(["layer", "part"]),
    default="layer",
    show_default=True,
    help="What is quantized at a time: the layers that a backend switches together, or a whole part.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Folder of images to compare on.  [default: those of the bundle's data that calibrate and verify nothing]",
)
@click.option("--all", "show_all", is_flag=True, help=f"Show all rows, not only the first {SHOWN}.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a bar chart into this SVG file.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all rows as CSV.")
@sets_option(help="Change one value of [quant] for this measurement; repeatable.")
@json_option
def sensitivity(
    bundle: Path | None,
    images: int | None,
    level: Literal["layer", "part"],
    data: Path | None,
    show_all: bool,
    plot: Path | None,
    csv_path: Path | None,
    sets: tuple[str, ...],
    as_json_: bool,
) -> None:
    """Rank the layers by what INT8 in them alone does to the detections.

    One group of layers at a time is quantized in the float model; the distance of the detections from the float model's
    is a mean over images. No labels are used. An interrupted measurement goes on where it was."""
    import edgedetr

    with progress_bars() as progress:
        result = edgedetr.sensitivity(
            open_bundle(bundle), images=images, level=level, data=data, sets=sets, progress=progress
        )
    rows = result.rows if show_all else result.rows[:SHOWN]
    table(
        ["", level, "kind", "role", "INT8 by policy", "million MACs", "distance", "+-"],
        [
            [n + 1, r.name, r.kind, r.role or "-", r.int8, f"{r.macs / 1e6:.1f}", f"{r.distance:.5f}", f"{r.error:.5f}"]
            for n, r in enumerate(rows)
        ],
    )
    if len(rows) < len(result.rows):
        say(f"... and {len(result.rows) - len(rows)} less sensitive ones (--all)")
    _explain(result)
    if plot is not None:
        from edgedetr.reporting.figures import sensitivity_bars

        _write(plot, sensitivity_bars(result.rows))
    if csv_path is not None:
        _write_csv(csv_path, result)
    if as_json_:
        as_json(result.to_json())


def _explain(result: SensitivityResult) -> None:
    say(
        f"distance: mean over {result.images} images of {', '.join(result.splits)} that are neither for calibration "
        "nor for verification; 0 = the float model's detections"
    )
    if result.forwards_whole:
        say(f"{result.forwards:.0f} runs of the whole model instead of {result.forwards_whole:.0f}")
    if result.rank_correlation is None:
        say("the order cannot be checked: too few rows or images", fg="yellow")
        return
    say(f"rank correlation between two halves of the images: {result.rank_correlation:.2f}")
    if not result.reliable:
        say("WARNING: below 0.9 the order is not to be trusted; compare on more: --images N", fg="yellow")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"written: {path}")


def _write_csv(path: Path, result: SensitivityResult) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [item.name for item in fields(type(result.rows[0]))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in result.rows)
    _write(path, stream.getvalue())
