"""edgedetr selftest: checks that TensorRT on this device computes correctly."""

from __future__ import annotations

from edgedetr.cli._options import command, json_option
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.errors import NotWithinTolerance


@command()
@json_option
def selftest(as_json_: bool) -> int:
    """Check that TensorRT computes correctly here.

    Builds and runs three small graphs that some versions of TensorRT computed wrongly. Exit code 3 if one is wrong."""
    from edgedetr.runtime.tensorrt.selftest import selftest as run

    with progress_bars() as progress:
        found = run(progress)
    say(f"TensorRT {found.tensorrt}, CUDA {found.device.runtime}, {found.device.name} (sm_{found.device.sm})")
    table(
        ["graph", "precision", "dB", "at least", "layers in it", "CUDA graph", "s", "verdict"],
        [
            [
                o.about,
                o.precision,
                None if o.sqnr_db is None else f"{o.sqnr_db:.0f}",
                f"{o.floor_db:.0f}",
                None if o.share is None else f"{100 * o.share:.0f} %",
                "yes" if o.graph else "no",
                f"{o.seconds:.1f}",
                "right" if o.passed else "WRONG",
            ]
            for o in found.outcomes
        ],
    )
    for outcome in found.outcomes:
        if outcome.note:
            say(f"{outcome.name}: {outcome.note}", fg="yellow")
    if as_json_:
        as_json(found.to_json())
    return 0 if found.passed else NotWithinTolerance.exit_code
