"""edgedetr import: detectors made elsewhere become bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgedetr.cli._options import expect, json_option, read_size
from edgedetr.cli._output import as_json, say

BOXES = ("cxcywh", "xyxy", "xywh", "cxcywh-pixels", "xyxy-pixels", "xywh-pixels")


@click.command("import")
@click.argument("source", metavar="SOURCE", callback=expect("model"))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bundle to write.")
@click.option("--model", help="Member of the family that the weights belong to; not for an ONNX file.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Data directory: its classes, and what to calibrate and verify on.",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    help="Names of the class logits, one a line; `-` is one that is not used.  [default: the data set's]",
)
@click.option("--input", "size", metavar="HxW", callback=read_size, help="Input size.  [default: the model's own]")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a recipe value (weights).")
@click.option("--scale", type=float, help="What the ONNX file wants pixels multiplied by.  [default: 1/255]")
@click.option("--mean", type=float, nargs=3, help="Mean that it wants subtracted then, R G B.  [default: 0 0 0]")
@click.option("--std", type=float, nargs=3, help="Deviation to divide by then, R G B.  [default: 1 1 1]")
@click.option(
    "--resize", type=click.Choice(["stretch", "letterbox"]), help="How it wants images fitted.  [default: stretch]"
)
@click.option("--activation", type=click.Choice(["sigmoid", "softmax"]), help="Of its class logits.")
@click.option(
    "--boxes",
    type=click.Choice(BOXES),
    help="How it writes boxes, where their numbers leave two ways open.  [default: as the file shows]",
)
@click.option("--outputs", help="Its outputs that count, with commas: CLASSES,BOXES.  [default: as the file shows]")
@click.option(
    "--columns",
    type=click.Choice(["index", "category-id"]),
    help="Where a class of the data set stands among its logits.  [default: index]",
)
@click.option(
    "--sampling",
    type=click.Choice(["gather", "grid_sample"]),
    help="How its GridSamples are written; TensorRT 10.14 to 11.1 get the operator wrong.  [default: gather]",
)
@json_option
def import_(
    source: str,
    out: Path,
    model: str | None,
    data: Path | None,
    classes: Path | None,
    size: tuple[int, int] | None,
    sets: tuple[str, ...],
    scale: float | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    resize: Literal["stretch", "letterbox"] | None,
    activation: Literal["sigmoid", "softmax"] | None,
    boxes: str | None,
    outputs: str | None,
    columns: Literal["index", "category-id"] | None,
    sampling: Literal["gather", "grid_sample"] | None,
    as_json_: bool,
) -> None:
    """Make a bundle of a model trained elsewhere.

    SOURCE is an ONNX file of a DETR-like detector (RT-DETR, D-FINE, RF-DETR), or weights for one of the family: a
    .safetensors or .pth file, a folder of transformers, or a name on the Hugging Face hub, with --model."""
    import edgedetr

    options = edgedetr.ImportOptions(
        data=data,
        classes=classes,
        size=size,
        model=model,
        sets=sets,
        scale=scale,
        mean=mean,
        std=std,
        resize=resize,
        activation=activation,
        boxes=boxes,
        outputs=tuple(name.strip() for name in outputs.split(",")) if outputs is not None else (),
        columns=columns,
        sampling=sampling,
    )
    result = edgedetr.import_model(source, out, options)
    say(result.describe())
    say(f"imported: {out}\nnext: edgedetr export {out}{' --int8' if source.endswith('.onnx') else ''}")
    if as_json_:
        as_json(result.to_json())
