"""edgedetr build: builds TensorRT engines for this device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgedetr.artifacts import ENGINE_GRAPHS, PROFILE
from edgedetr.bundle import Bundle
from edgedetr.cli._options import Graph, advanced_option, bundle_argument, command, json_option, open_bundle, read_size
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.errors import UsageError

MOST_SHOWN = 10  # layers in the table of a profile


def _batch_range(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int, int] | None:
    """Callback of --dynamic: `1,4,8` -> (1, 4, 8)."""
    if text is None:
        return None
    try:
        least, usual, largest = (int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}; expected three numbers: least, usual, largest, as in 1,4,8") from error
    return least, usual, largest


@command()
@bundle_argument
@click.option(
    "--precision",
    "--stage",
    "precision",
    multiple=True,
    type=Graph(engine=True),
    metavar=f"[{'|'.join(reversed(ENGINE_GRAPHS))}]",
    help="Precision; repeatable.  [default: fp16 and int8, if the bundle has them]",
)
@click.option("--batch", type=click.IntRange(1), multiple=True, help="Images per run; repeatable.  [default: 1]")
@advanced_option(
    "--dynamic", metavar="MIN,OPT,MAX", callback=_batch_range, help="One engine for a range of batch sizes."
)
@click.option(
    "--frame", metavar="HxW", callback=read_size, help="Build the engine for whole camera frames of this size."
)
@advanced_option(
    "--workspace", type=click.IntRange(1), metavar="MB", help="Memory for kernels.  [default: a part of the device's]"
)
@advanced_option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="How long TensorRT searches for fast kernels.",
)
@advanced_option(
    "--typing",
    type=click.Choice(["auto", "strong", "weak"]),
    default="auto",
    show_default=True,
    help="strong: the types of the graph; weak: TensorRT 10 chooses; auto: weak if strong fails.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Time every layer in FP16 and in INT8 on this device, for `edgedetr export --max-drop AP --target tensorrt`.",
)
@click.option("--force", is_flag=True, help="Build again, even if the engine is up to date.")
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
    profile: bool,
    force: bool,
    as_json_: bool,
) -> None:
    """Build TensorRT engines for this device.

    An engine works on one kind of device with one version of TensorRT: run this on the device. Engines that are up to
    date are kept."""
    from edgedetr.runtime.tensorrt import build as engine

    opened = open_bundle(bundle)
    if profile:
        if precision or batch or dynamic or frame:
            raise UsageError(
                "--profile times FP16 and INT8 on one image; leave --precision, --batch, --dynamic and --frame out"
            )
        _profile(opened, workspace, optimization_level, typing, force, as_json_)
        return
    if batch and dynamic:
        raise UsageError("--batch and --dynamic exclude each other: an engine takes one batch size or a range of them")
    present = tuple(one for one in ("fp16", "int8") if ENGINE_GRAPHS[one].file in opened.manifest.files)
    wanted = precision or present or ("int8",)
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
        metadata = made.metadata
        fraction = metadata.layers.fraction(metadata.arguments.precision)
        rows.append(
            [
                made.path.name,
                f"{metadata.plan_bytes / 1e6:.1f}",
                f"{metadata.seconds:.0f} s" if made.made else "kept",
                metadata.typing,
                metadata.layers.layers,
                None if fraction is None else f"{100 * fraction:.0f} %",
                metadata.layers.reformats,
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
            f"engines of older graphs, which you may delete ({megabytes:.0f} MB; each has a .plan, a .json "
            f"and a .layers.json): {', '.join(path.stem for path in old)}"
        )
    say(f"engines: {built[0].path.parent}\nnext: edgedetr verify {opened.path}")
    if as_json_:
        as_json([{"path": str(made.path), "made": made.made, **asdict(made.metadata)} for made in built])


def _profile(
    bundle: Bundle, workspace: int | None, optimization_level: int, typing: str, force: bool, as_json_: bool
) -> None:
    from edgedetr.runtime import jetson
    from edgedetr.runtime.tensorrt.profiling import profile

    with progress_bars() as progress:
        found = profile(
            bundle,
            workspace_mb=workspace,
            optimization_level=optimization_level,
            typing=typing,
            force=force,
            progress=progress,
        )
    engines = found.float, found.int8
    table(
        ["engine of", "typing", "layers", "ms", "of it reformats"],
        [[one.onnx, one.typing, len(one.layers), f"{one.ms:.3f}", f"{one.reformat_ms:.3f}"] for one in engines],
    )
    slowest = sorted(found.int8.layers, key=lambda layer: -layer.ms)[:MOST_SHOWN]
    table(["slowest layers in INT8", "type", "ms"], [[one.name[:60], one.kind, f"{one.ms:.3f}"] for one in slowest])
    for line in jetson.read().advice():
        say(line)
    say(
        f"written: {bundle.path / PROFILE.file}\nnext, where the bundle is searched, with this file in it: "
        f"edgedetr export {bundle.path.name} --int8 --max-drop POINTS --target tensorrt"
    )
    if as_json_:
        as_json(found.to_json())
