"""Commands that make something: train and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from edgedetr.bundle import Bundle
from edgedetr.commands.choose import bundle_argument, expect, open_bundle, read_size
from edgedetr.commands.show import progress_bars, say, table
from edgedetr.errors import PreparedNotFinished, UsageError

set_option = click.option(
    "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; repeatable."
)


@click.command()
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), callback=expect("data"),
    help="Data directory: COCO, YOLO or VOC layout."
)
@click.option("--recipe", "recipe_name", callback=expect("recipe"),
              help="A shipped recipe by name, or a TOML file.  [default: the edge default]")
@click.option("--preset", default="", metavar="parity|strong", help="Values over the recipe: the originals' training, "
              "or much regularisation.  [default: neither]")
@click.option("--start", metavar="BUNDLE|FILE|HUB_ID", callback=expect("start"),
              help="Start from a whole detector's weights.  [default: the recipe's, else the backbone's]")
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="The bundle to write.  [default: runs/DATA.bundle]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the bundle, also after a crash.")
@click.option("--strict", is_flag=True, help="Fail on an unreadable image or annotation instead of leaving it out.")
def train(
    data: Path, recipe_name: str | None, preset: str, start: str | None, sets: tuple[str, ...], out: Path | None,
    resume: bool, strict: bool
) -> None:
    """Train a detector on labelled images.

    Writes a bundle: one directory that the other commands add to."""
    from edgedetr.recipe import DEFAULT, Recipe
    from edgedetr.train.progress import RichProgress
    from edgedetr.train.train import train as run

    if recipe_name is None:
        say(f"recipe: {DEFAULT} (the default; --recipe chooses another)")
    starts = () if start is None else (f"train.start={json.dumps(start)}",)
    recipe = Recipe.load(recipe_name or DEFAULT, sets=(*sets, *starts), preset=preset)
    out = out or Path("runs") / f"{data.resolve().name}.bundle"
    say(f"bundle: {out}")
    bundle = run(recipe, data, out, resume=resume, strict=strict, progress=RichProgress())
    say(f"trained: {bundle.path}\nnext: edgedetr export {bundle.path}")


@click.command()
@bundle_argument
@click.option("--int8", is_flag=True, help="Calibrate, and write the INT8 graphs as well.")
@click.option("--trt", is_flag=True, help="Write model.fp16.onnx as well, and build the engines where TensorRT is.")
@click.option(
    "--calib",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Calibration images.  [default: the train split of the bundle's data]",
)
@click.option(
    "--sampling",
    type=click.Choice(["gather", "grid_sample"]),
    help="How deformable attention samples.  [default: the recipe's]",
)
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one value of quant or export, "
              "also in the bundle's recipe; repeatable.")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open: for engines of several pictures.")
@click.option(
    "--frame",
    metavar="HxW",
    callback=read_size,
    help="Also graphs for whole camera frames of this size, e.g. 1080x1920.",
)
@click.option("--triton", type=click.Path(path_type=Path), help="Add the model to this Triton repository.")
@click.option("--deepstream", type=click.Path(path_type=Path), help="Write graph, labels and nvinfer file here.")
def export(
    bundle: Path | None,
    int8: bool,
    trt: bool,
    calib: Path | None,
    sampling: Literal["gather", "grid_sample"] | None,
    sets: tuple[str, ...],
    dynamic_batch: bool,
    frame: tuple[int, int] | None,
    triton: Path | None,
    deepstream: Path | None,
) -> None:
    """Write model.onnx; with --int8, INT8 graphs too; with --trt, engines.

    Exit 4 when the engines are still to be built, on the device."""
    opened = open_bundle(bundle)
    if calib is not None and not (int8 or trt):
        raise UsageError("--calib is for quantising; add --int8 or --trt")
    if trt and sampling is None and not any(text.startswith("export.sampling=") for text in sets):
        sampling = "gather"     # some versions of TensorRT miscompile GridSample
    from edgedetr.export.export import export as run
    from edgedetr.export.settings import record, settings

    chosen = settings(opened, sets) if sets else None       # a mistyped value is said before anything is made

    with progress_bars() as progress:
        run(
            opened,
            int8=int8,
            fp16=trt,
            calib=calib,
            sampling=sampling,
            dynamic_batch=dynamic_batch,
            config=chosen.export if chosen else None,
            quant=chosen.quant if chosen else None,
            progress=progress,
        )
    if chosen:
        record(opened, chosen)
    missing = _why_no_engines() if trt else None
    if trt and not missing:
        _engines(opened.path, ("fp16", "int8") if int8 else ("fp16",))
    if frame or triton or deepstream:
        from edgedetr.export.serving import serve

        for line in serve(opened, fp16=trt, int8=int8, frame=frame, triton=triton, deepstream=deepstream):
            say(line)
    made = [(name, entry) for name, entry in Bundle.open(opened.path).manifest.files.items() if entry.stage != "train"]
    table(["file", "MB", "made by"], [[name, f"{entry.size / 1e6:.2f}", entry.stage] for name, entry in made])
    if missing:
        raise PreparedNotFinished(
            f"{opened.path}: the graphs for TensorRT are ready, the engines are not: they are built on the device "
            f"they run on, and not here ({missing}); copy the bundle there and run: edgedetr build {opened.path.name}"
            + (f" (and again with --frame {frame[0]}x{frame[1]})" if frame else "")
        )
    say(f"next: edgedetr {'verify' if int8 else 'export'} {opened.path}{'' if int8 else ' --int8'}")


def _why_no_engines() -> str | None:
    """Why no engine can be built here, or None."""
    from edgedetr.runtime import engine

    return engine.available()


def _engines(path: Path, precisions: tuple[str, ...]) -> None:
    """Build the engines of a bundle."""
    from edgedetr.runtime import engine

    for precision in precisions:
        with progress_bars() as progress:
            made = engine.build(Bundle.open(path), precision, progress=progress)
        say(f"engine: {made.path}{'' if made.made else ' (kept)'}")


COMMANDS = (train, export)
