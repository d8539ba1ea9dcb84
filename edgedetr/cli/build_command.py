"""Commands about TensorRT engines: build."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgedetr.artifacts import ENGINE_GRAPHS
from edgedetr.cli._options import bundle_argument, json_option, open_bundle, read_size
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.errors import UsageError


def _three(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int, int] | None:
    """`1,4,8` -> (1, 4, 8)."""
    if text is None:
        return None
    try:
        least, usual, largest = (int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}; expected three numbers: least, usual, largest, as in 1,4,8") from error
    return least, usual, largest


@click.command()
@bundle_argument
@click.option(
    "--precision",
    multiple=True,
    type=click.Choice([*reversed(ENGINE_GRAPHS)]),
    help="Which graph; repeatable.  [default: fp16 and int8, as far as the bundle has them]",
)
@click.option("--batch", type=click.IntRange(1), multiple=True, help="Images of a run; repeatable.  [default: 1]")
@click.option(
    "--dynamic", metavar="MIN,OPT,MAX", callback=_three, help="One engine for several batch sizes, instead of --batch."
)
@click.option("--frame", metavar="HxW", callback=read_size, help="The engine for whole camera frames of this size.")
@click.option("--workspace", type=click.IntRange(1), metavar="MB", help="Memory for kernels.  [default: a safe share]")
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), default=3, show_default=True, help="How long kernels are sought."
)
@click.option(
    "--typing",
    type=click.Choice(["auto", "strong", "weak"]),
    default="auto",
    show_default=True,
    help="Whether the graph decides about types, or TensorRT 10 does.",
)
@click.option("--force", is_flag=True, help="Build again what is there and fits.")
@json_option
def build(
    bundle: Path | None,
    precision: tuple[str, ...],
    batch: tuple[int, ...],
    dynamic: tuple[int, int, int] | None,
    frame: tuple[int, int] | None,
    workspace: int | None,
    optimization_level: int,
    typing: str,
    force: bool,
    as_json_: bool,
) -> None:
    """Build TensorRT engines for this device.

    An engine belongs to one device and one version of TensorRT, so run this where it will work. What fits is kept."""
    from edgedetr.runtime.tensorrt import build as engine

    opened = open_bundle(bundle)
    if batch and dynamic:
        raise UsageError("--batch and --dynamic exclude each other: an engine is for one batch size or for several")
    there = tuple(one for one in ("fp16", "int8") if ENGINE_GRAPHS[one].file in opened.manifest.files)
    wanted = precision or there or ("int8",)
    built = []
    with progress_bars() as progress:
        for one in wanted:
            for size in [dynamic] if dynamic else batch or (1,):
                built.append(
                    engine.build(
                        opened,
                        one,
                        batch=size,
                        frame=frame,
                        workspace_mb=workspace,
                        optimization_level=optimization_level,
                        typing=typing,
                        force=force,
                        progress=progress,
                    )
                )
    rows = []
    for made in built:
        told, share = made.metadata, made.metadata.layers.share(made.metadata.arguments.precision)
        kept = f"{told.seconds:.0f} s" if made.made else "kept"
        rows.append(
            [
                made.path.name,
                f"{told.plan_bytes / 1e6:.1f}",
                kept,
                told.typing,
                told.layers.layers,
                None if share is None else f"{100 * share:.0f} %",
                told.layers.reformats,
            ]
        )
    table(["engine", "MB", "built in", "typing", "layers", "in its precision", "reformats"], rows)
    for made in built:
        for warning in made.metadata.warnings:
            say(f"warning: {made.path.name}: {warning}")
    old = engine.outdated(opened)
    if old:
        megabytes = sum(path.stat().st_size for path in old) / 1e6
        say(
            f"engines of graphs that are gone, which may be deleted ({megabytes:.0f} MB; each has a .plan, a .json "
            f"and a .layers.json): {', '.join(path.stem for path in old)}"
        )
    say(f"engines: {built[0].path.parent}\nnext: edgedetr verify {opened.path}")
    if as_json_:
        as_json([{"path": str(made.path), "made": made.made, **asdict(made.metadata)} for made in built])
