"""Lists the shipped recipes: model, input, size, what each starts from, and its first line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgedetr.api import choose_training
from edgedetr.models import build
from edgedetr.recipe import Recipe, shipped_recipes

COCO_CLASSES = 80  # for which parameters are counted


@dataclass(frozen=True)
class RecipeSummary:
    """One shipped recipe.

    model       the member
    height, width  of the input, pixels
    parameters  for 80 classes
    start       weights of a whole detector, or "backbone" or "random", of `train --recipe NAME`
    model_start  the same of `train --model NAME`
    about       the first line of the file
    file        its path
    """

    name: str
    model: str
    height: int
    width: int
    parameters: int
    start: str
    model_start: str
    about: str
    file: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def summarize(name: str, path: Path) -> RecipeSummary:
    """One recipe; its model is built without memory or downloads."""
    import torch

    recipe = Recipe.load(path)
    config = recipe.model.config
    backbone = getattr(config, "backbone_weights", "random")
    if backbone != "random":
        config = replace(config, backbone_weights="random")
    with torch.device("meta"):
        parameters = sum(value.numel() for value in build(recipe.model.name, config, COCO_CLASSES).parameters())
    start = recipe.train.start or ("random" if backbone == "random" else "backbone")
    size = recipe.input
    about = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    model_start = str(choose_training(model=name).start or start) if name in shipped_recipes() else start
    return RecipeSummary(
        name, recipe.model.name, size.height, size.width, parameters, start, model_start, about, str(path)
    )


def summaries() -> list[RecipeSummary]:
    """All shipped recipes, by model, the smaller ones first."""
    found = [summarize(name, path) for name, path in shipped_recipes().items()]
    return sorted(found, key=lambda one: (one.model, one.parameters, one.name))
