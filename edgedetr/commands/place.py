"""Commands about this place: the data, the demonstration, the machine and the family of models."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from edgedetr.commands.choose import expect, json_option
from edgedetr.commands.show import as_json, progress_bars, say, table
from edgedetr.errors import NotWithinTolerance
from edgedetr.printable import printable


@click.group()
def data() -> None:
    """Look at a data set."""


@data.command()
@click.argument("directory", type=click.Path(path_type=Path), callback=expect("data"))
@click.option("--strict", is_flag=True, help="Exit 1 when anything had to be left out.")
@json_option
def check(directory: Path, strict: bool, as_json_: bool) -> int:
    """Print splits, classes, box sizes and everything odd in a data set.

    Exit 1 where no split can be used."""
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


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo.bundle"),
    show_default=True,
    help="The bundle to write.",
)
@click.option("--fresh", is_flag=True, help="Remove what an earlier demonstration left there, and start again.")
@json_option
def demo(out: Path, fresh: bool, as_json_: bool) -> int:
    """The whole way on a rendered set, in minutes.

    Renders, trains, exports, quantises, verifies and reports; everything lands in one bundle. A demonstration that was
    stopped goes on where it was.
    """
    from edgedetr.commands.measure import show_verdict
    from edgedetr.demo import DATA, run
    from edgedetr.train.progress import RichProgress

    if fresh and (out / DATA / "params.json").is_file():
        shutil.rmtree(out)
    say("synthetic data: rendered shapes on clutter; the figures below say nothing about photographs")
    outcome = run(out, training=RichProgress(), bars=progress_bars)
    say("")
    show_verdict(dict(outcome.verdict))
    say("time: " + ", ".join(f"{step} {seconds:.0f} s" for step, seconds in outcome.seconds.items()))
    say(f"bundle: {out}\nreport: {outcome.report}")
    if as_json_:
        as_json({"seconds": outcome.seconds, "report": str(outcome.report), "verdict": outcome.verdict})
    return 0 if outcome.verdict["passed"] else NotWithinTolerance.exit_code


@click.command()
@json_option
def doctor(as_json_: bool) -> None:
    """Say what this machine has and what is missing."""
    from edgedetr.doctor import examine

    found = examine()
    table(["", ""], found.machine_rows())
    table(["package", "version", "needed for", "state"], found.package_rows())
    for advice in found.advice():
        say(advice)
    if as_json_:
        as_json(found.to_json())


@click.command()
@click.option("--pixels", default=640, show_default=True, type=click.IntRange(64, 4096),
              help="Side of the picture that the multiply-accumulates are counted for; a multiple of 64.")
@json_option
def models(pixels: int, as_json_: bool) -> None:
    """List the family: papers, sizes, cost, feature levels, queries, dialects."""
    from edgedetr.catalogue import describe
    from edgedetr.models import FAMILY

    members = [describe(name, pixels=pixels) for name in FAMILY]
    table(
        ["name", "M parameters", f"GMACs at {pixels}", "levels (strides)", "queries", "exports to", "paper"],
        [[m.name, f"{m.parameters / 1e6:.1f}", f"{m.gmacs:.1f}", " ".join(str(stride) for *_, stride in m.levels),
          m.queries, " ".join(m.dialects), m.paper] for m in members],
    )
    if as_json_:
        as_json([m.to_json() for m in members])


COMMANDS = (data, demo, doctor, models)
