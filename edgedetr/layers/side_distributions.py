"""Boxes whose four sides are distributions: how far each side is moved is the mean over bins of unequal width.

Peng et al. 2024, "D-FINE", section 4.1 (Fine-grained Distribution Refinement). A side moves by W(n) / scale box sides
with probability Pr(n), n = 0..R; sides are ordered left, top, right, bottom, and outwards is positive.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgedetr.layers.feedforward import Mlp


def bin_values(up: Tensor, scale: Tensor, bins: int) -> Tensor:
    """W(0..R), the movement that each bin means, in box sides times scale: dense around 0, and 2 a at the ends.

    Between the ends W grows by a constant factor per bin from 0 to a = up * scale, on both sides of the middle.

    up, scale  [1]   largest fine movement in box sides; how far W is from linear (larger: bins closer to the middle)
    bins       R, even and at least 4
    return     [R + 1]
    """
    largest = (up * scale).abs()
    number = torch.arange(bins + 1, device=up.device, dtype=up.dtype) - bins // 2
    inner = number.sign() * ((largest + 1) ** (number.abs() * (2 / (bins - 2))) - 1)
    return torch.where(number.abs() == bins // 2, number.sign() * 2 * largest, inner)


class SideBins(nn.Module):
    """The bins of all four sides. `up` and `scale` are constants that files of weights hold.

    Means over the bins are linear, and so is what sides say about center and size: one matrix product does both.
    """

    shape_only = True  # a constant of the deployed graph

    up: Tensor
    scale: Tensor

    def __init__(self, bins: int, up: float, scale: float) -> None:
        super().__init__()
        self.bins = bins
        self.register_buffer("up", torch.tensor([up]))
        self.register_buffer("scale", torch.tensor([scale]))

    def values(self) -> Tensor:
        """W [R + 1]."""
        return bin_values(self.up, self.scale, self.bins)

    def forward(self) -> Tensor:
        """-> [4 (R + 1), 4]: probabilities of left, top, right, bottom -> movement of x, y and growth of w, h, in box
        sides."""
        moved = self.values() / self.scale.abs()  # in box sides
        zero = torch.zeros_like(moved)
        rows = []
        for sign in (-0.5, 0.5):  # left and top move the center by half of it backwards, right and bottom forwards
            rows.append(torch.stack([moved * sign, zero, moved, zero], -1))
            rows.append(torch.stack([zero, moved * sign, zero, moved], -1))
        return torch.cat(rows)


class SideIntegral(nn.Module):
    """Boxes whose sides moved by their distributions' means: softmax, one product with a constant matrix, two sums."""

    def forward(self, logits: Tensor, matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the bins, and boxes.

        logits  [B, N, 4 (R + 1)]
        matrix  [4 (R + 1), 4] of `SideBins`
        start   [B, N, 4]   cx, cy, w, h in 0..1 of the image
        return  [B, N, 4, R + 1], and [B, N, 4] as `start`; a box may reach beyond the image, or be inside out
        """
        probability = logits.unflatten(-1, (4, len(matrix) // 4)).softmax(-1)
        center, size = start.split(2, dim=-1)
        shift, growth = (probability.flatten(-2) @ matrix).split(2, dim=-1)
        return probability, torch.cat([center + size * shift, size + size * growth], dim=-1)


class SideQuality(nn.Module):
    """A number that is added to a query's class logits: how sure the distributions of its sides are (D-FINE's LQE).

    Li et al. 2021, "Generalized Focal Loss V2", section 3.2: a peaked distribution means a good box. Seen are the
    largest probabilities of each side, and their mean.
    """

    def __init__(self, top: int = 4, hidden: int = 64, layers: int = 2, activation: str = "relu") -> None:
        super().__init__()
        self.top = top
        self.confidence = Mlp(4 * (top + 1), hidden, 1, layers, activation=activation)
        for parameter in self.confidence.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, probability: Tensor) -> Tensor:
        """probability [B, N, 4, R + 1] -> [B, N, 1]."""
        best = probability.topk(self.top, dim=-1).values
        seen = torch.cat([best, best.mean(-1, keepdim=True)], dim=-1)
        quality: Tensor = self.confidence(seen.flatten(-2))
        return quality
