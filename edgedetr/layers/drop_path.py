"""Stochastic depth: whole residual branches are dropped at random while training, deeper ones more often.

Huang et al. 2016, "Deep Networks with Stochastic Depth"; identity in evaluation, so exported graphs do not contain it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from edgedetr.options import one_of

Schedule = Literal["linear", "exponential"]


class DropPath(nn.Module):
    """A branch that is zero for each image with probability `rate`, else 1 / (1 - rate) times itself."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """branch [B, ...] -> the same shape."""
        if not self.training or not self.rate:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.dim() - 1), device=branch.device) >= self.rate
        return branch * (keep.to(branch.dtype) / (1 - self.rate))

    def change(self, old: Tensor, new: Tensor) -> Tensor:
        """`new`, seen as a branch beside `old` that may be dropped: [B, ...] each -> the same shape."""
        return old + self(new - old) if self.training and self.rate else new

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def rate_at(depth: float, highest: float, schedule: Schedule) -> float:
    """Rate of a block at `depth` 0..1 (first..last): p d, or p (e^d - 1) / (e - 1)."""
    one_of("train.drop_path_schedule", schedule, get_args(Schedule))
    return highest * (depth if schedule == "linear" else math.expm1(depth) / math.expm1(1.0))


def set_rates(root: nn.Module, highest: float, schedule: Schedule) -> tuple[float, ...]:
    """Set the rate of every block of `root`, in construction order: the last block gets the highest rate.

    A block is a module with a DropPath child; all its paths get its rate. A single block gets the highest rate.
    -> the rates, block by block; empty if there is no block
    """
    blocks = [[child for child in module.children() if isinstance(child, DropPath)] for module in root.modules()]
    blocks = [paths for paths in blocks if paths]
    last = len(blocks) - 1
    rates = tuple(rate_at(number / last if last else 1.0, highest, schedule) for number in range(len(blocks)))
    for paths, rate in zip(blocks, rates):
        for path in paths:
            path.rate = rate
    return rates
