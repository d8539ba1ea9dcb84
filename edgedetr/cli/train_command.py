"""edgedetr train: from labeled images to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import expect
from edgedetr.cli._output import say

set_option = click.option(
    "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; repeatable."
)


@click.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Data directory: COCO, YOLO or VOC layout.",
)
@click.option(
    "--recipe",
    "recipe_name",
    callback=expect("recipe"),
    help="A shipped recipe by name, or a TOML file.  [default: the edge default]",
)
@click.option(
    "--preset",
    default="",
    metavar="parity|strong",
    help="Values over the recipe: the originals' training, or much regularisation.  [default: neither]",
)
@click.option(
    "--start",
    metavar="BUNDLE|FILE|HUB_ID",
    callback=expect("start"),
    help="Start from a whole detector's weights.  [default: the recipe's, else the backbone's]",
)
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="The bundle to write.  [default: runs/DATA.bundle]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the bundle, also after a crash.")
@click.option("--strict", is_flag=True, help="Fail on an unreadable image or annotation instead of leaving it out.")
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

    Writes a bundle: one directory that the other commands add to."""
    import edgedetr
    from edgedetr.api import default_bundle
    from edgedetr.cli._training_bar import training_bar
    from edgedetr.recipe import DEFAULT

    if recipe_name is None:
        say(f"recipe: {DEFAULT} (the default; --recipe chooses another)")
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
