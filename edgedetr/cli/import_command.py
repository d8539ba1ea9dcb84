"""edgedetr import: makes a bundle of a model trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgedetr.cli._options import advanced_option, command, expect, json_option, license_option, read_size, sets_option
from edgedetr.cli._output import as_json, say

BOXES = ("cxcywh", "xyxy", "xywh", "cxcywh-pixels", "xyxy-pixels", "xywh-pixels")


@command("import")
@click.argument("source", metavar="SOURCE", callback=expect("model"))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle to write.")
@click.option(
    "--model", help="Which model the weights are of (edgedetr models); not for an ONNX file or a published detector."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Folder of a data set: its classes, and images for calibration and verification.",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    help="File with the name of each class logit, one per line; `-`: not used.  [default: the data set's]",
)
@click.option("--input", "size", metavar="HxW", callback=read_size, help="Size of the input.  [default: the model's]")
@sets_option(help="Change one value of the recipe; only for weights; repeatable.")
@license_option
@advanced_option("--scale", type=float, help="The ONNX file expects (pixel * scale - mean) / std.  [default: 1/255]")
@advanced_option("--mean", type=float, nargs=3, help="Mean in that, R G B.  [default: 0 0 0]")
@advanced_option("--std", type=float, nargs=3, help="Standard deviation in that, R G B.  [default: 1 1 1]")
@advanced_option(
    "--resize",
    type=click.Choice(["stretch", "letterbox"]),
    help="How images are resized for the ONNX file.  [default: stretch]",
)
@advanced_option(
    "--activation",
    type=click.Choice(["sigmoid", "softmax"]),
    help="Activation of the class logits.  [default: as the file shows]",
)
@advanced_option("--boxes", type=click.Choice(BOXES), help="Format of the boxes.  [default: as the file shows]")
@advanced_option(
    "--outputs", metavar="CLASSES,BOXES", help="Names of the outputs to use.  [default: as the file shows]"
)
@advanced_option(
    "--columns",
    type=click.Choice(["index", "category-id"]),
    help="Which logit belongs to a class of the data set: number index, or category-id.  [default: index]",
)
@advanced_option(
    "--sampling",
    type=click.Choice(["gather", "grid_sample"]),
    help="Write GridSample as gathers, because TensorRT 10.14 to 11.1 compute it wrongly.  [default: gather]",
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
    accept_license: tuple[str, ...],
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

    SOURCE is an ONNX file of a DETR-like detector (RT-DETR, D-FINE, RF-DETR), or a published detector (edgedetr models
    --published). With --model it is weights: a .safetensors or .pth file, a folder of transformers, or a Hugging Face
    id."""
    import edgedetr

    options = edgedetr.ImportOptions(
        data=data,
        classes=classes,
        size=size,
        model=model,
        sets=sets,
        accept_license=accept_license,
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
