"""edgedetr train: trains a detector on labeled images and writes a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import advanced_option, command, expect, sets_option
from edgedetr.cli._output import say


@command()
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Folder of the data set: COCO, YOLO or VOC layout.",
)
@click.option(
    "--recipe",
    "recipe_name",
    callback=expect("recipe"),
    help="Name of a shipped recipe, or a TOML file.  [default: rtdetr-r18]",
)
@click.option(
    "--preset",
    default="",
    metavar="parity|strong",
    help="Change the recipe: as the paper trains, or with strong augmentation.  [default: neither]",
)
@click.option(
    "--start",
    metavar="BUNDLE|FILE|HUB_ID",
    callback=expect("start"),
    help="Weights of a detector to start from.  [default: the recipe's, else a pretrained backbone]",
)
@sets_option(help="Change one value of the recipe, for example train.epochs=30; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle to write.  [default: runs/DATA.bundle]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the bundle.")
@advanced_option("--strict", is_flag=True, help="Fail on an unreadable image or annotation instead of leaving it out.")
def train(
    data: Path,
    recipe_name: str | None,
    preset: str,
    start: str | None,
    sets: tuple[str, ...],
    out: Path | None,
    resume: bool,
    strict: bool,
) -> None:
    """Train a detector on labeled images.

    Writes a bundle: one folder with the weights, to which the other commands add their files."""
    import edgedetr
    from edgedetr.api import default_bundle
    from edgedetr.cli._training_bar import training_bar
    from edgedetr.recipe import DEFAULT

    if recipe_name is None:
        say(f"recipe: {DEFAULT} (the default; choose another with --recipe)")
    out = out or default_bundle(data)
    say(f"bundle: {out}")
    bundle = edgedetr.train(
        data,
        out,
        recipe=recipe_name,
        preset=preset,
        start=start,
        sets=sets,
        resume=resume,
        strict=strict,
        progress=training_bar(),
    )
    say(f"trained: {bundle.path}\nnext: edgedetr export {bundle.path}")
