"""The moving average of the weights: what is evaluated, exported and delivered."""

from __future__ import annotations

import copy
import math

import torch

from edgedetr.models.detector import DetrModel


class Ema:
    """average <- d * average + (1 - d) * weights after each step, with d = decay * (1 - exp(-step / warmup)) (RT-DETR).

    Running statistics of BatchNorm are averaged too; counters are copied. With decay 0 the average is the weights.
    """

    def __init__(self, model: DetrModel, decay: float, warmup: int) -> None:
        self.decay, self.warmup = decay, warmup
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        ours, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        self._average = [ours[name] for name in floating]
        self._weights = [theirs[name] for name in floating]
        counters = [name for name in ours if name not in floating]
        self._counts, self._counters = [ours[name] for name in counters], [theirs[name] for name in counters]

    def rate(self, step: int) -> float:
        """d after `step` steps, counted from 1."""
        return self.decay * (1 - math.exp(-step / self.warmup)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self._average, self._weights, 1 - self.rate(step))
        if self._counts:
            torch._foreach_copy_(self._counts, self._counters)
