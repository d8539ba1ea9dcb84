"""edgedetr export: writes ONNX files in FP32, FP16 and INT8, engines, and files for servers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgedetr.artifacts import QUANTIZERS
from edgedetr.cli._options import (
    advanced_option,
    bundle_argument,
    command,
    expect,
    open_bundle,
    read_size,
    sets_option,
    threads_option,
)
from edgedetr.cli._output import progress_bars, say, table
from edgedetr.errors import PreparedNotFinished, UsageError


@command()
@bundle_argument
@click.option("--int8", is_flag=True, help="Write the INT8 files too; calibrates on the training images.")
@click.option("--fp16", is_flag=True, help="Write the FP16 file too, for TensorRT.")
@click.option("--trt", is_flag=True, help="Like --fp16, and build the engines if TensorRT is on this machine.")
@click.option(
    "--calib",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Folder of calibration images.  [default: the training images]",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="AP",
    help="With --int8: search for the fastest INT8 that is proved to lose at most so many points of AP.",
)
@click.option(
    "--target",
    metavar="[onnxruntime|openvino|tensorrt]",
    help="With --int8: the library to cure of its known faults, and to make fast.  [default: all; onnxruntime]",
)
@advanced_option("--search-images", type=click.IntRange(8), help="Images to compare placements on.  [default: 64]")
@threads_option
@advanced_option(
    "--sampling",
    type=click.Choice(["gather", "grid_sample"]),
    help="Operators of deformable attention.  [default: gather for TensorRT, else the recipe's]",
)
@sets_option(help="Change one value of [quant] or [export] in the bundle's recipe; repeatable.")
@advanced_option("--dynamic-batch", is_flag=True, help="Leave the batch size open, for engines of several images.")
@advanced_option(
    "--quantizer",
    "quantizers",
    multiple=True,
    type=click.Choice(tuple(QUANTIZERS)),
    metavar="NAME",
    help="With --int8: write the INT8 of another quantizer too, to be measured beside ours; repeatable. "
    f"One of {', '.join(QUANTIZERS)}.",
)
@advanced_option(
    "--cure",
    "cures",
    multiple=True,
    metavar="NAME",
    help="With --int8: keep the layers of a known pattern float, as `verify --localize` advises; repeatable.",
)
@advanced_option("--no-cure", is_flag=True, help="With --int8: leave known faults of a library in the graphs.")
@advanced_option(
    "--frame",
    metavar="HxW",
    callback=read_size,
    help="Write files that take whole camera frames of this size too, for example 1080x1920.",
)
@advanced_option("--triton", type=click.Path(path_type=Path), help="Add the model to this Triton model repository.")
@advanced_option("--strict", is_flag=True, help="Exit code 4 if engines must still be built on the device.")
@advanced_option("--deepstream", type=click.Path(path_type=Path), help="Write DeepStream's files into this folder.")
def export(
    bundle: Path | None,
    int8: bool,
    fp16: bool,
    trt: bool,
    calib: Path | None,
    sampling: Literal["gather", "grid_sample"] | None,
    sets: tuple[str, ...],
    dynamic_batch: bool,
    quantizers: tuple[str, ...],
    max_drop: float | None,
    target: str | None,
    search_images: int | None,
    threads: int | None,
    cures: tuple[str, ...],
    no_cure: bool,
    frame: tuple[int, int] | None,
    triton: Path | None,
    deepstream: Path | None,
    strict: bool,
) -> None:
    """Convert the model to ONNX in FP32, FP16 and INT8.

    With --max-drop, layers go to INT8 as the budget allows: each is measured, and the fastest graph that is proved on
    the verify images to keep the budget is written. Exit code 3 if none is.

    Engines are built on the device they run on. Where they cannot be built here, that is said; with --strict the exit
    code is then 4."""
    import edgedetr

    if strict and not trt:
        raise UsageError("--strict is about engines that cannot be built here; add --trt, or leave it out")
    with progress_bars() as progress:
        result = edgedetr.export(
            open_bundle(bundle),
            fp16=fp16,
            int8=int8,
            engines=trt,
            calib=calib,
            sampling=sampling,
            dynamic_batch=dynamic_batch,
            quantizers=quantizers,
            max_drop=max_drop,
            target=target,
            search_images=search_images,
            threads=threads,
            cures=cures,
            known_cures=not no_cure,
            sets=sets,
            frame=frame,
            triton=triton,
            deepstream=deepstream,
            progress=progress,
        )
    if result.search is not None:
        from edgedetr.quantization.search.search_report import HEAD

        table(HEAD, result.search.rows())
    for note in result.notes:
        say(note)
    for engine in result.engines:
        say(f"engine: {engine.path}{'' if engine.made else ' (kept)'}")
    for line in result.serving.lines():
        say(line)
    path, files = result.bundle.path, result.bundle.manifest.files
    made = [[name, f"{entry.size / 1e6:.2f}", entry.stage] for name, entry in files.items() if entry.stage != "train"]
    table(["file", "MB", "made by"], made)
    if result.engines_missing:
        message = (
            f"{path}: the graphs for TensorRT are ready, the engines are not: they are built on the device they run "
            f"on, and not here ({result.engines_missing}); copy the bundle there and run: edgedetr build {path.name}"
            + (f" (and again with --frame {frame[0]}x{frame[1]})" if frame else "")
        )
        if strict:
            raise PreparedNotFinished(message)
        say(message)
        return
    say(f"next: edgedetr {'verify' if int8 else 'export'} {path}{'' if int8 else ' --int8'}")
