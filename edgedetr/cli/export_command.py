"""edgedetr export: ONNX graphs in FP32, FP16 and INT8, engines, and files for servers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgedetr.bundle import Bundle
from edgedetr.cli._options import bundle_argument, expect, open_bundle, read_size
from edgedetr.cli._output import progress_bars, say, table
from edgedetr.errors import PreparedNotFinished, UsageError


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
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Change one value of quant or export, also in the bundle's recipe; repeatable.",
)
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open: for engines of several images.")
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
        raise UsageError("--calib is for quantizing; add --int8 or --trt")
    if trt and sampling is None and not any(text.startswith("export.sampling=") for text in sets):
        sampling = "gather"  # some versions of TensorRT miscompile GridSample
    from edgedetr.exporting.export import export as run
    from edgedetr.exporting.settings import record, settings

    chosen = settings(opened, sets) if sets else None  # a mistyped value is said before anything is made

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
        from edgedetr.exporting.serving_files import serve

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
    from edgedetr.runtime.tensorrt import library

    return library.why_unavailable() or None


def _engines(path: Path, precisions: tuple[str, ...]) -> None:
    """Build the engines of a bundle."""
    from edgedetr.runtime.tensorrt import build

    for precision in precisions:
        with progress_bars() as progress:
            made = build.build(Bundle.open(path), precision, progress=progress)
        say(f"engine: {made.path}{'' if made.made else ' (kept)'}")
