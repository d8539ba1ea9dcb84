"""edgedetr eval: measures the AP of one model version."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.artifacts import BACKENDS, DELIVERED, ONNX
from edgedetr.cli._options import (
    Graph,
    bundle_argument,
    command,
    data_option,
    json_option,
    once,
    open_bundle,
    threads_option,
)
from edgedetr.cli._output import as_json, progress_bars, table


@command("eval")
@bundle_argument
@data_option
@click.option("--split", help="Split of the data set.  [default: the bundle's verify split]")
@click.option(
    "--stage",
    "--precision",
    "stage",
    multiple=True,
    type=Graph(),
    callback=once(),
    metavar="VERSION",
    help=f"Model version: torch, {', '.join(DELIVERED)} (onnx is also called fp32).  [default: {ONNX.id}]",
)
@click.option("--backend", type=click.Choice(BACKENDS), help="Inference library.  [default: the usual one]")
@threads_option
@json_option
def evaluate(
    bundle: Path | None,
    data: Path | None,
    split: str | None,
    stage: str | None,
    backend: str | None,
    threads: int | None,
    as_json_: bool,
) -> None:
    """Measure the AP of one model version (alias: val)."""
    opened = open_bundle(bundle)
    from edgedetr.evaluation.verify import evaluate_artifact

    with progress_bars() as progress:
        metrics = evaluate_artifact(
            opened,
            artifact=stage or ONNX.id,
            backend=backend,
            data=data,
            split=split,
            threads=threads,
            progress=progress,
        )
    rows = [
        ["AP", metrics.ap],
        ["AP50", metrics.ap50],
        ["AP75", metrics.ap75],
        ["AP small", metrics.ap_small],
        ["AP medium", metrics.ap_medium],
        ["AP large", metrics.ap_large],
    ]
    rows += [[f"AP {name}", value] for name, value in metrics.per_class.items()]
    rows += [["duplicate detections, %", metrics.duplicates]]
    table(["metric", "points"], [[name, None if value is None else f"{value:.2f}"] for name, value in rows])
    if as_json_:
        as_json(metrics.to_json())
