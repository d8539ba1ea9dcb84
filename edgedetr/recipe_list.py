"""Lists the shipped recipes: model, input, size, what each starts from, and its first line.

To count its parameters a model must be built, and 52 of them take many seconds. So the list of the shipped recipes is
kept in recipe_list.json, which `make docs` writes and a test compares with the models.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgedetr.model_list import COCO_CLASSES
from edgedetr.package_data import recipes_directory

RECORDED = Path(__file__).with_name("recipe_list.json")


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

    def to_record(self) -> dict[str, object]:
        """What recipe_list.json keeps: all but what is quickly read from the recipe's file."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "about", "file")}


def summaries() -> list[RecipeSummary]:
    """All shipped recipes, by model, the smaller ones first; one that is not recorded yet is counted."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    found = [
        RecipeSummary(name=path.stem, about=_first_line(path), file=str(path), **recorded[path.stem])
        if path.stem in recorded
        else summarize(path.stem, path)
        for path in recipes_directory().glob("*.toml")
    ]
    return sorted(found, key=lambda one: (one.model, one.parameters, one.name))


def summarize(name: str, path: Path) -> RecipeSummary:
    """One recipe; its model is built without memory or downloads."""
    import torch

    from edgedetr.api import choose_training
    from edgedetr.models import build
    from edgedetr.recipe import Recipe, shipped_recipes

    recipe = Recipe.load(path)
    config = recipe.model.config
    backbone = getattr(config, "backbone_weights", "random")
    if backbone != "random":
        config = replace(config, backbone_weights="random")
    with torch.device("meta"):
        parameters = sum(value.numel() for value in build(recipe.model.name, config, COCO_CLASSES).parameters())
    start = recipe.train.start or ("random" if backbone == "random" else "backbone")
    size = recipe.input
    model_start = str(choose_training(model=name).start or start) if name in shipped_recipes() else start
    return RecipeSummary(
        name, recipe.model.name, size.height, size.width, parameters, start, model_start, _first_line(path), str(path)
    )


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def main() -> None:
    """Write recipe_list.json again."""
    found = {path.stem: summarize(path.stem, path).to_record() for path in sorted(recipes_directory().glob("*.toml"))}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
