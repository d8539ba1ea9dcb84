"""What a training writes into the bundle: description, resolved recipe and the weights of the moving average."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from edgedetr.artifacts import WEIGHTS
from edgedetr.bundle import Bundle, ClassInfo, DataRecord, Manifest, OutputContract
from edgedetr.data.detection_set import DataConfig
from edgedetr.layers.lora import merged
from edgedetr.models.detector import DetrModel
from edgedetr.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delivery:
    """What goes into the bundle at `out`.

    place   the splits that the recipe's empty names stand for
    model   the moving average; its weights are those at the moment of writing
    """

    out: Path
    recipe: Recipe
    place: DataConfig
    data: Path
    classes: tuple[ClassInfo, ...]
    model: DetrModel

    def write(self) -> None:
        """The bundle with the weights as they are now."""
        recipe, place = self.recipe, self.place
        record = DataRecord(str(self.data.resolve()), place.verify_split, place.train_split)
        bundle = Bundle.create(
            self.out,
            Manifest(
                recipe.model.name,
                self.classes,
                recipe.input.contract(),
                OutputContract(recipe.model.config.activation),
                config=asdict(recipe.model.config),
                data=record,
                budget=recipe.verify.budget,
            ),
        )
        recipe.to_bundle(bundle, stage="train")
        with bundle.add(WEIGHTS.file, stage=WEIGHTS.step, made_from=WEIGHTS.made_from) as path:
            save_file({name: value.contiguous() for name, value in merged(self.model).state_dict().items()}, path)

    def finish(self) -> None:
        """The recipe as it is now: what a checkpoint does not depend on may have changed since the weights."""
        if not (self.out / WEIGHTS.file).is_file():
            log.warning("%s has lost its weights, which were the best ones; the last ones are written", self.out)
            self.write()
        bundle = Bundle.open(self.out)
        if self.recipe.to_bundle(bundle, stage="train"):  # the checkpoint's fingerprint says that the weights are its
            bundle.update(budget=self.recipe.verify.budget)
