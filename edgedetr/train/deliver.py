"""What a training writes into the bundle: description, resolved recipe and the weights of the moving average."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, Manifest, OutputContract
from edgedetr.data.form import DataConfig
from edgedetr.layers.lora import merged
from edgedetr.models.detector import Detector
from edgedetr.recipe import Recipe


def write(out: Path, recipe: Recipe, place: DataConfig, data: Path, classes: tuple[ClassInfo, ...],
          model: Detector) -> None:
    """The bundle at `out`.

    place   the splits that the recipe's empty names stand for
    """
    record = DataRecord(str(data.resolve()), place.verify_split, place.train_split)
    bundle = Bundle.create(out, Manifest(
        recipe.model.name, classes, recipe.input.contract(), OutputContract(recipe.model.config.activation),
        config=asdict(recipe.model.config), data=record, budget=recipe.verify.budget))
    recipe.to_bundle(bundle, stage="train")
    with bundle.add("weights.safetensors", stage="train", made_from=["recipe.toml"]) as path:
        save_file({name: value.contiguous() for name, value in merged(model).state_dict().items()}, path)


def keep_recipe(out: Path, recipe: Recipe) -> None:
    """The recipe as it is now: what a checkpoint does not depend on may have changed since the weights were written."""
    bundle = Bundle.open(out)
    if recipe.to_bundle(bundle, stage="train"):     # the checkpoint's fingerprint says that the weights are its
        bundle.update(budget=recipe.verify.budget)
