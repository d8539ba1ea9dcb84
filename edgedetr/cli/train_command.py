"""edgedetr train: trains a detector on labeled images and writes a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgedetr.cli._options import advanced_option, command, expect, license_option, once, sets_option
from edgedetr.cli._output import say
from edgedetr.cli._words import merge, word_options
from edgedetr.errors import UsageError


@command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Folder of the data set (COCO, YOLO or VOC layout), or its data.yaml.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="What to train: a shipped recipe (edgedetr recipes), a model or a published detector. Where its size is "
    "published, training starts from those weights.  [default: rtdetr-r18]",
)
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME|FILE",
    callback=expect("recipe"),
    help="Instead of --model: a shipped recipe or a TOML file, trained as it is written.",
)
@click.option(
    "--preset",
    default="",
    metavar="NAME",
    help="Change the recipe: parity, as the paper trains; strong; deim; or finetune, numbers that follow from your "
    "images.  [default: none]",
)
@click.option(
    "--weights",
    "--start",
    "start",
    metavar="NAME|BUNDLE|FILE",
    multiple=True,
    callback=once(expect("start")),
    help="Weights to start from: a published detector (edgedetr models --published), a bundle, a file or a Hugging "
    "Face id; none: a pretrained backbone; random: nothing.  [default: the recipe's]",
)
@license_option
@word_options
@click.option(
    "--device",
    metavar="cpu|cuda|0,1",
    help="Where to train; numbers choose GPUs.  [default: a GPU if there is one, else the CPU]",
)
@click.option(
    "--qat",
    "quantized",
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    callback=expect("bundle"),
    help="Instead of a recipe: train this bundle's detector on for INT8, with rounding and the float detector as its "
    "teacher, on the bundle's data or on --data.",
)
@sets_option(help="Change one value of the recipe, for example train.epochs=30; repeatable.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The bundle to write.  [default: runs/DATA.bundle; with --qat NAME-qat.bundle]",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the bundle.")
@advanced_option("--strict", is_flag=True, help="Fail on an unreadable image or annotation instead of leaving it out.")
def train(
    data: Path | None,
    model: str | None,
    recipe_name: str | None,
    preset: str,
    start: str | None,
    accept_license: tuple[str, ...],
    device: str | None,
    quantized: Path | None,
    sets: tuple[str, ...],
    out: Path | None,
    resume: bool,
    strict: bool,
    **words: Any,
) -> None:
    """Train a detector on labeled images.

    Writes a bundle: one folder with the weights, to which the other commands add their files."""
    if quantized is not None:
        refuse_beside_qat(
            {"--model": model, "--recipe": recipe_name, "--preset": preset or None, "--start": start},
            {"--accept-license": accept_license or None, "--teacher": words.get("teacher")},
        )
        train_for_int8(
            quantized, data=data, out=out, device=device, sets=merge(words, sets, {}), resume=resume, strict=strict
        )
        return
    if data is None:
        raise UsageError("train needs --data DIR, a data set; or --qat BUNDLE, to train a bundle on for INT8")
    import edgedetr
    from edgedetr.api import choose_training, default_bundle
    from edgedetr.cli._training_bar import training_bar
    from edgedetr.recipe import DEFAULT, find

    others = {"train.start": "--start"} if start is not None else {}
    sets = merge(words, sets, others)
    choice = choose_training(model=model, recipe=recipe_name, start=start, preset=preset)
    found, named = find(choice.recipe), model or recipe_name
    if named is None:
        what = "the default; choose another with --model" if choice.recipe == DEFAULT else f"of {start}"
        say(f"recipe: {found.stem} ({what})")
    elif found.stem != named and str(found) != str(Path(named)):
        say(f"recipe: {found.stem} (of {named})")
    if choice.preset != preset:
        say(f"preset: {choice.preset}, for the start from {choice.start}; as published: --recipe {found.stem}")
    out = out or default_bundle(data)
    say(f"bundle: {out}")
    bundle = edgedetr.train(
        data,
        out,
        model=model,
        recipe=recipe_name,
        preset=preset,
        start=start,
        accept_license=accept_license,
        device=device,
        sets=sets,
        resume=resume,
        strict=strict,
        progress=training_bar(),
    )
    say(f"trained: {bundle.path}\nnext: edgedetr export {bundle.path}")


def refuse_beside_qat(*groups: dict[str, object]) -> None:
    """Errors: UsageError for options that choose what the bundle of --qat has chosen already."""
    given = [name for group in groups for name, value in group.items() if value is not None]
    if given:
        raise UsageError(
            f"{given[0]} beside --qat: the bundle's recipe and weights are trained on, with its float detector as "
            f"teacher; leave {' and '.join(given)} out; --set changes single values"
        )


def train_for_int8(
    bundle: Path,
    *,
    data: Path | None,
    out: Path | None,
    device: str | None,
    sets: Sequence[str],
    resume: bool,
    strict: bool,
) -> None:
    """edgedetr train --qat."""
    from edgedetr.api import train_qat
    from edgedetr.cli._training_bar import training_bar

    shown: set[str] = set()

    def steps(what: str, done: int, total: int) -> None:
        if what not in shown:
            shown.add(what)
            say(f"{what} ...")

    result = train_qat(
        bundle,
        out,
        data=data,
        device=device,
        sets=sets,
        resume=resume,
        strict=strict,
        progress=training_bar(),
        steps=steps,
    )
    say(f"trained for INT8: {result.path}\nnext: edgedetr export {result.path} --int8")
