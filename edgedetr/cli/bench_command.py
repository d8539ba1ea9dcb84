"""edgedetr bench: compares the speed of the files of a bundle, alternating between them."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import bundle_argument, command, json_option, open_bundle, threads_option
from edgedetr.cli._output import as_json, progress_bars, say, table


@command()
@bundle_argument
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True, help="Timed runs of each file.")
@threads_option
@json_option
def bench(bundle: Path | None, rounds: int, threads: int | None, as_json_: bool) -> None:
    """Compare the speed of all model versions, alternating."""
    opened = open_bundle(bundle)
    from edgedetr.evaluation.bench import bench as run

    with progress_bars() as progress:
        timings = run(opened, rounds=rounds, threads=threads, progress=progress)
    table(
        ["version", "backend", "p50 ms", "p99 ms", "MB"],
        [[t.name, t.backend, f"{t.p50_ms:.2f}", f"{t.p99_ms:.2f}", f"{t.size_mb:.2f}"] for t in timings],
    )
    for timing in timings:
        if timing.integers is not None:
            say(f"{timing.name} ({timing.backend}): {timing.integers.finding() or timing.integers}")
    from edgedetr.runtime import jetson

    if conditions := jetson.read().conditions():
        say(conditions)
    if as_json_:
        as_json([t.to_json() for t in timings])
