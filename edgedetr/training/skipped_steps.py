"""A step whose loss or gradient is NaN or infinite changes nothing; several in a row end the training."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from edgedetr.errors import TrainingError

log = logging.getLogger(__name__)

SKIPS = 5  # in a row: one bad image is in one batch of an epoch, spoilt weights are in every one


class Statistics:
    """Running means and variances of BatchNorm as they were before a step: a NaN would stay in them for good."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._live = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        for kept, live in zip(self._kept, self._live):
            kept.copy_(live)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, live in zip(self._kept, self._live):
            live.copy_(kept)


def tell(what: str, step: int, names: str, skipped: int) -> None:
    """Say which step was skipped, and with which images."""
    log.warning(
        "step %d is skipped: %s became NaN or infinite on %s (%d skipped so far; %d in a row end the training)",
        step,
        what,
        names,
        skipped,
        SKIPS,
    )


def too_many(what: str, step: int, names: str, saved: Path, data: Path, rate: float) -> TrainingError:
    """The error of a training whose last SKIPS steps were all skipped.

    saved   the last checkpoint, from before them
    rate    train.lr
    """
    kept = f"{saved} is as it was before" if saved.exists() else "no checkpoint had been written yet"
    return TrainingError(
        f"{what} became NaN or infinite at step {step}, on {names}, as in the {SKIPS - 1} steps before; {kept}. Look "
        f"at these images (edgedetr data check {data}), or lower --set train.lr (now {rate}) or set "
        "train.precision=32, and train into another --out"
    )
