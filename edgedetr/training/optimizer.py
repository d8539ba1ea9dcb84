"""AdamW with parameter groups by module, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from edgedetr.errors import ModelError, RecipeError
from edgedetr.models.detector import DetrModel
from edgedetr.training.config import TrainConfig

BLOCK = re.compile(r"^backbone\.transformer\.blocks\.(\d+)\.")  # of a ViT
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
ENTRY = re.compile(r"^backbone\.transformer\.(patch|position|class_token)")


def groups(detector: DetrModel, config: TrainConfig) -> list[dict[str, object]]:
    """Trainable parameters by rate and by decay; every one stands in exactly one group.

    The backbone learns more slowly, and so do the slow parameters that a member declares. `config.decay` decides what
    decays: by default not norms and biases (all that has fewer than two dimensions). Within a ViT the rate falls from
    block to block towards its input.
    """
    if config.layer_decay < 1 and not any(BLOCK.match(name) for name, _ in detector.named_parameters()):
        raise ModelError(f"train.layer_decay is {config.layer_decay}, but the backbone is no ViT; expected 1")
    sorted_: dict[tuple[float, bool], list[nn.Parameter]] = {}
    norms = {
        f"{owner}.{name}"
        for owner, module in detector.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            decays = {"matrices": parameter.ndim >= 2, "not_norms": name not in norms, "all": True}[config.decay]
            factor = config.slow_lr_factor if detector.member.is_slow(name) else 1.0
            if name.startswith("backbone."):
                factor = config.backbone_lr_factor * config.layer_decay ** _steps_from_the_top(name, detector)
            sorted_.setdefault((factor, decays), []).append(parameter)
    return [
        {"params": parameters, "base_lr": config.lr * factor, "weight_decay": config.weight_decay if decays else 0.0}
        for (factor, decays), parameters in sorted(sorted_.items())
    ]


def _steps_from_the_top(name: str, detector: DetrModel) -> int:
    """How many blocks of a ViT lie between a parameter and the transformer's output, itself counted; 0 elsewhere.

    The rate is multiplied by d^(L - i) for block i of L, counted from 0, and by d^(L + 1) for patches and positions.
    """
    block, entry = BLOCK.match(name), ENTRY.match(name)
    if not block and not entry:
        return 0
    depth = len(detector.backbone.transformer.blocks)  # type: ignore[union-attr, arg-type]  # its parameters are named so
    return depth - int(block[1]) if block else depth + 1


def adamw(detector: DetrModel, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer; `set_rate` gives each group its learning rate before every step."""
    fused = config.precision != "16"  # a fused step unscales fp16 gradients itself, after they should be clipped
    return torch.optim.AdamW(groups(detector, config), lr=config.lr, betas=config.betas, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Share of the full learning rate at a step, counted from 0: warm-up times schedule."""
    return _warmup(config, step) * _schedule(config, step, steps_per_epoch)


def _warmup(config: TrainConfig, step: int) -> float:
    if step >= config.warmup_steps:
        return 1.0
    share = (step + 1) / (config.warmup_steps + 1)  # never 0, so that no step is lost
    if config.warmup == "linear":
        return share
    if config.warmup == "exponential":
        return 1000.0 ** (share - 1)  # from about a thousandth
    raise RecipeError(f"train.warmup is {config.warmup!r}; expected 'linear' or 'exponential'")


def _schedule(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs)
    if config.schedule == "cosine":
        begin, end = min(config.warmup_steps, config.epochs * steps_per_epoch - 1), config.epochs * steps_per_epoch
        share = max(0.0, (step - begin) / (end - begin))
        return config.final_lr_factor + (1 - config.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * share))
    raise RecipeError(f"train.schedule is {config.schedule!r}; expected 'constant', 'step' or 'cosine'")
