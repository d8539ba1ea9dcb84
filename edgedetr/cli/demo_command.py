"""edgedetr demo: all steps, end to end, on rendered images."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from edgedetr.cli._options import command, json_option
from edgedetr.cli._output import as_json, progress_bars, say
from edgedetr.errors import NotWithinTolerance


@command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo.bundle"),
    show_default=True,
    help="The bundle to write.",
)
@click.option("--fresh", is_flag=True, help="Remove the files of an earlier demo, and start again.")
@json_option
def demo(out: Path, fresh: bool, as_json_: bool) -> int:
    """Run all steps on rendered images, in minutes.

    Renders, trains, exports, quantizes, verifies and reports, into one bundle. A demo that was stopped goes on where it
    stopped.
    """
    from edgedetr.cli._training_bar import training_bar
    from edgedetr.cli.verify_command import show_verdict
    from edgedetr.demo import DATA, run

    if fresh and (out / DATA / "params.json").is_file():
        shutil.rmtree(out)
    say("synthetic data: rendered shapes on clutter; the figures below do not apply to photographs")
    outcome = run(out, training=training_bar(), bars=progress_bars)
    say("")
    show_verdict(outcome.verdict)
    say("time: " + ", ".join(f"{step} {seconds:.0f} s" for step, seconds in outcome.seconds.items()))
    say(f"bundle: {out}\nreport: {outcome.report}")
    if as_json_:
        as_json({"seconds": outcome.seconds, "report": str(outcome.report), "verdict": outcome.verdict.to_json()})
    return 0 if outcome.verdict.passed else NotWithinTolerance.exit_code
