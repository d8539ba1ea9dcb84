"""edgedetr export: ONNX graphs in FP32, FP16 and INT8, engines, and files for servers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgedetr.cli._options import bundle_argument, expect, open_bundle, read_size
from edgedetr.cli._output import progress_bars, say, table
from edgedetr.errors import PreparedNotFinished


@click.command()
@bundle_argument
@click.option("--int8", is_flag=True, help="Calibrate, and write the INT8 graphs as well.")
@click.option("--fp16", is_flag=True, help="Write model.fp16.onnx as well, for TensorRT.")
@click.option("--trt", is_flag=True, help="As --fp16, and build the engines where TensorRT is.")
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
    fp16: bool,
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
    import edgedetr

    with progress_bars() as progress:
        result = edgedetr.export(
            open_bundle(bundle),
            fp16=fp16,
            int8=int8,
            engines=trt,
            calib=calib,
            sampling=sampling,
            dynamic_batch=dynamic_batch,
            sets=sets,
            frame=frame,
            triton=triton,
            deepstream=deepstream,
            progress=progress,
        )
    for engine in result.engines:
        say(f"engine: {engine.path}{'' if engine.made else ' (kept)'}")
    for line in result.serving.lines():
        say(line)
    path, files = result.bundle.path, result.bundle.manifest.files
    made = [[name, f"{entry.size / 1e6:.2f}", entry.stage] for name, entry in files.items() if entry.stage != "train"]
    table(["file", "MB", "made by"], made)
    if result.engines_missing:
        raise PreparedNotFinished(
            f"{path}: the graphs for TensorRT are ready, the engines are not: they are built on the device they run "
            f"on, and not here ({result.engines_missing}); copy the bundle there and run: edgedetr build {path.name}"
            + (f" (and again with --frame {frame[0]}x{frame[1]})" if frame else "")
        )
    say(f"next: edgedetr {'verify' if int8 else 'export'} {path}{'' if int8 else ' --int8'}")
