"""Builds the model that is trained, and joins it with its criterion into one module from images to losses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from edgedetr.bundle import ClassInfo
from edgedetr.errors import ModelError, TrainingError
from edgedetr.layers import drop_path, lora
from edgedetr.models import build, member
from edgedetr.models.checkpoints import pretrained
from edgedetr.models.detector import DetrModel
from edgedetr.recipe import Recipe
from edgedetr.training import denoising
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.data.dataset import PaddedTargets
from edgedetr.training.distillation import distillation_loss
from edgedetr.training.feature_distillation import FeatureDistillation
from edgedetr.training.start_weights import Start, load_start
from edgedetr.training.teacher import Teacher

log = logging.getLogger(__name__)


class TrainingModule(nn.Module):
    """The model and its criterion as one module: DistributedDataParallel and autocast must wrap both.

    teacher   asked about every batch, without being a part of the module
    features  compares the encoder's map with that of a transformer; it has weights that are trained
    """

    def __init__(
        self,
        model: DetrModel,
        config: TrainConfig,
        class_loss: str,
        classes: int,
        *,
        teacher: Teacher | None = None,
        features: FeatureDistillation | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.features = teacher, features
        self.model, self.config, self.classes = model, config, classes
        self.criterion = Criterion(config, class_loss, model.class_agnostic_proposals)
        self.encode = torch.compile(model.encode) if config.compile else model.encode
        self.decode = torch.compile(model.decode) if config.compile else model.decode

    def forward(self, images: Tensor, targets: Callable[[], PaddedTargets], objects_per_process: float) -> Tensor:
        """Losses [9] in the order of Losses.NAMES; only the first has a gradient.

        images   [B, 3, H, W] uint8, RGB
        targets  a function, because autocast rounds float arguments of a module to 16 bits
        objects_per_process  objects in all processes / processes
        """
        padded = targets()
        # Channels last: a sixth more images per second on a CPU (measured: rt_detr nano, 320 px, one core).
        pixels = images.float().contiguous(memory_format=torch.channels_last)
        with self.features.watching() if self.features is not None else nullcontext():
            memory = self.encode(self.model.normalize(pixels))
        queries = self.model.select_to_train(memory)
        noised = denoising.noise(padded, self.classes, self.config) if self.model.denoises else None
        if noised is None:
            outputs = self.decode(queries, memory)
            losses = self.criterion(outputs, padded, None, objects_per_process)
        else:
            known = self.model.noised_queries(noised.labels, noised.boxes)
            outputs = self.decode(denoising.prepend(queries, known, noised), memory)
            outputs, denoised = denoising.split(outputs, noised, padded)
            losses = self.criterion(outputs, padded, denoised, objects_per_process)
        if self.features is not None:
            losses = losses.with_teacher(self.features(pixels))
        if self.teacher is not None:
            taught, weight = self.teacher(pixels), self.config.teacher_weight
            losses = losses.with_teacher(distillation_loss(outputs, taught, self.criterion.costs, self.config, weight))
        return losses.stacked()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random number of a step (dropout, noised queries) a function of seed, step and process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


def build_model(
    recipe: Recipe,
    classes: tuple[ClassInfo, ...],
    *,
    load_weights: bool,
    on_start: Callable[[Start], None] | None = None,
) -> DetrModel:
    """The recipe's model in training mode, with frozen parts, adapters and stochastic depth as the recipe asks.

    load_weights  load pretrained weights; False where a checkpoint replaces all of them
    on_start      called with what was loaded of a whole detector
    Errors: ModelError, TrainingError where nothing would learn.
    """
    config = recipe.train
    model = build(recipe.model.name, recipe.model.config, len(classes))
    reinitialized: tuple[str, ...] = ()
    if load_weights and config.start:
        start = load_start(model, recipe, [item.name for item in classes])
        reinitialized = start.loaded.fresh
        if on_start is not None:
            on_start(start)
    elif load_weights:
        pretrained.load_backbone(model, recipe.model.config)
    if config.drop_path:
        rates = drop_path.set_rates(model, config.drop_path, config.drop_path_schedule)
        if not max(rates, default=0.0):
            raise ModelError(
                f"train.drop_path is {config.drop_path}, but {recipe.model.name} has no block with stochastic depth; "
                "expected 0"
            )
        log.info("train.drop_path: %d blocks are dropped at rates of %.3g to %.3g", len(rates), rates[0], rates[-1])
    if config.lora_rank:
        untrained = untrained_patterns(recipe)
        freeze(model, ("*",), but=(*config.lora_beside, *untrained))
        lora.adapt(model, config.lora_on, config.lora_rank, config.lora_alpha, but=untrained)
    freeze(model, config.freeze)
    still = [name for name, value in model.named_parameters() if name in reinitialized and not value.requires_grad]
    if still:
        log.warning(
            "reinitialized for these classes, but frozen: %s; to train them, remove them from train.freeze",
            ", ".join(still),
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(f"train.freeze {list(config.freeze)} freezes every parameter; use fewer patterns")
    return model.train()


def untrained_patterns(recipe: Recipe) -> tuple[str, ...]:
    """Patterns of the parameters that may hold random weights, and therefore learn fully beside LoRA adapters.

    They follow from the recipe alone, so that a resumed training has the same ones: with train.start, the parameters
    that depend on the classes; without, everything except a pretrained backbone.
    """
    if recipe.train.start:
        return member(recipe.model.name).per_class
    if recipe.model.config.backbone_weights == "random":
        return ("*",)
    return ("encoder.*", "selector.*", "decoder.*", "backbone.levels.*")


def freeze(model: nn.Module, patterns: tuple[str, ...], but: tuple[str, ...] = ()) -> None:
    """Freeze the parameters whose names match `patterns` and not `but`; ModelError for a pattern that matches none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"train.freeze: no parameter name matches {pattern!r}; expected patterns of names like "
                f"{', '.join(names[:3])}"
            )
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, p) for p in patterns) and not any(fnmatchcase(name, p) for p in but):
            parameter.requires_grad_(False)
