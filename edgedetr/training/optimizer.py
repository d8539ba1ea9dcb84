"""Changes the weights: AdamW with parameter groups, the learning-rate schedule, and the moving average (EMA)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from edgedetr.errors import ModelError, RecipeError
from edgedetr.models.detector import DetrModel
from edgedetr.training.config import AugmentConfig, ResolvedTrainConfig

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (nn.LayerNorm, nn.GroupNorm, *BATCH_NORMS)


def adamw(model: DetrModel, config: ResolvedTrainConfig, beside: nn.Module | None = None) -> torch.optim.AdamW:
    """The optimizer; `set_lr` gives each group its learning rate before every step.

    beside   a module that is trained with the model, as one further group
    """
    fused = config.precision != "16"  # a fused step would unscale fp16 gradients after they were clipped
    groups = parameter_groups(model, config)
    if beside is not None:
        groups.append({"params": list(beside.parameters()), "base_lr": config.lr, "weight_decay": config.weight_decay})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def parameter_groups(model: DetrModel, config: ResolvedTrainConfig) -> list[dict[str, object]]:
    """Trainable parameters, grouped by learning rate and weight decay; each parameter is in exactly one group.

    The backbone learns more slowly, and so do the parameters that the member declares as slow. `config.decay` selects
    what decays: by default not norms and biases (all that has fewer than two dimensions). Within a ViT the learning
    rate falls from block to block towards the input.
    """
    layers_above: Callable[[str], int] | None = getattr(model.backbone, "layers_above", None)  # of a ViT
    if config.layer_decay < 1 and layers_above is None:
        raise ModelError(f"train.layer_decay is {config.layer_decay}, but the backbone is not a ViT; expected 1")
    norms = {
        f"{owner}.{name}"
        for owner, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = {"matrices": parameter.ndim >= 2, "not_norms": name not in norms, "all": True}[config.decay]
            lr_multiplier = config.slow_lr_factor if model.member.is_slow(name) else 1.0
            if name.startswith("backbone."):
                above = layers_above(name.removeprefix("backbone.")) if layers_above else 0
                lr_multiplier = config.backbone_lr_factor * config.layer_decay**above
            groups.setdefault((lr_multiplier, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": config.lr * multiplier,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (multiplier, decays), parameters in sorted(groups.items())
    ]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times its full rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@dataclass(frozen=True)
class Schedule:
    """The steps of a training, and the learning rate at each of them.

    epochs           epochs in all; train.minutes may make them fewer than train.epochs
    steps_per_epoch  optimizer steps of an epoch
    augment          when strong augmentation is off, which the images' sizes and "flat_cosine" follow
    """

    config: ResolvedTrainConfig
    epochs: int
    steps_per_epoch: int
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch

    def size_fractions(self, epoch: int) -> list[float]:
        """The image sizes of an epoch (counted from 0), as fractions of the input's sides; one is drawn per batch.

        The last epochs, without strong augmentation, have one size.
        """
        growth, sizes = self.config.growth, self.config.sizes
        base = growth[min(epoch * len(growth) // self.epochs, len(growth) - 1)] if growth else 1.0
        several = sizes and epoch < self.augment.last_epochs_from(self.epochs)
        return [base * fraction for fraction in sizes] if several else [base]

    def lr_factor(self, step: int) -> float:
        """Learning rate at a step (counted from 0), as a fraction of the full rate: warm-up times schedule."""
        return self._warmup(step) * self._decay(step)

    def _warmup(self, step: int) -> float:
        if step >= self.config.warmup_steps:
            return 1.0
        fraction = (step + 1) / (self.config.warmup_steps + 1)  # never 0, so that every step learns
        if self.config.warmup == "linear":
            return fraction
        if self.config.warmup == "exponential":
            return 1000.0 ** (fraction - 1)  # from about a thousandth
        if self.config.warmup == "quadratic":
            return fraction**2
        raise RecipeError(f"train.warmup is {self.config.warmup!r}; expected 'linear', 'exponential' or 'quadratic'")

    def _decay(self, step: int) -> float:
        config = self.config
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "step":
            return 0.1 ** sum(step >= epoch * self.steps_per_epoch for epoch in config.step_epochs)
        if config.schedule == "cosine":
            begin = min(config.warmup_steps, self.steps - 1)
            return self._cosine(max(0.0, (step - begin) / (self.steps - begin)))
        if config.schedule == "flat_cosine":  # RTMDet's, with DEIM's last part
            begin = round(self.epochs * config.flat) * self.steps_per_epoch
            end = self.augment.last_epochs_from(self.epochs) * self.steps_per_epoch
            return 1.0 if step <= begin else self._cosine(min(1.0, (step - begin) / max(end - begin, 1)))
        raise RecipeError(
            f"train.schedule is {config.schedule!r}; expected 'constant', 'step', 'cosine' or 'flat_cosine'"
        )

    def _cosine(self, fraction: float) -> float:
        """From 1 to the final factor, at a fraction of the way."""
        final = self.config.final_lr_factor
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction))


class Ema:
    """The moving average of the weights, which is evaluated, exported and written to the bundle.

    average <- d * average + (1 - d) * weights after each step, with d = decay * (1 - exp(-step / warmup)) (RT-DETR).
    Running statistics of BatchNorm are averaged too; integer buffers are copied. With decay 0 the average is the
    weights.
    """

    def __init__(self, model: DetrModel, decay: float, warmup: int) -> None:
        self.decay, self.warmup = decay, warmup
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        average, weights = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in average.items() if value.is_floating_point()]
        counters = [name for name in average if name not in floating]
        self._average, self._weights = [average[name] for name in floating], [weights[name] for name in floating]
        self._counters, self._live_counters = [average[name] for name in counters], [weights[name] for name in counters]

    def decay_at(self, step: int) -> float:
        """d after `step` steps (counted from 1)."""
        return self.decay * (1 - math.exp(-step / self.warmup)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after `step` steps (counted from 1)."""
        get_ema_multi_avg_fn(self.decay_at(step))(self._average, self._weights, step)
        for counter, live in zip(self._counters, self._live_counters):
            counter.copy_(live)
