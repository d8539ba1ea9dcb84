"""Layers whose weights are predicted: per query (dynamic instance interaction), or per image (dynamic ReLU).

Sun et al. 2021, "Sparse R-CNN", section 3.2; Chen et al. 2020, "Dynamic ReLU", form B; Dai et al. 2021, "Dynamic Head".
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.linear import Linear
from edgedetr.options import one_of


class DynamicInteraction(nn.Module):
    """1x1 convolutions of a box's features with weights predicted from its query, then one Linear over all bins.

    layers 2: C -> hidden -> C, as in Sparse R-CNN; 1: C -> C, the full matrix of Dynamic DETR's figure 4.
    """

    def __init__(self, dim: int, bins: int, hidden: int = 64, layers: int = 2) -> None:
        """bins  features per box (7 x 7); hidden  width between the two products"""
        super().__init__()
        one_of("model.dynamic_layers", layers, (1, 2))
        sizes = [dim, hidden, dim] if layers == 2 else [dim, dim]
        self.pairs = list(pairwise(sizes))
        self.weights = Linear(dim, sum(a * b for a, b in self.pairs))
        self.norms = nn.ModuleList(nn.LayerNorm(b) for _, b in self.pairs)
        self.out, self.out_norm = Linear(bins * dim, dim), nn.LayerNorm(dim)
        for linear in (self.weights, self.out):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, content: Tensor, features: Tensor) -> Tensor:
        """content [B, N, C], features [B, N, bins, C] of each query's box -> [B, N, C]."""
        weights = self.weights(content).split([a * b for a, b in self.pairs], dim=-1)
        for (inputs, outputs), weight, norm in zip(self.pairs, weights, self.norms):
            features = F.relu(norm(features @ weight.unflatten(-1, (inputs, outputs))))
        return F.relu(self.out_norm(self.out(features.flatten(2))))


class DynamicRelu(nn.Module):
    """max(a1 x + b1, a2 x + b2) per channel, with a and b predicted from the mean of the map; ReLU if they are zero."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = Linear(channels, channels // reduction)
        self.excite = Linear(channels // reduction, 4 * channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps: P of [B, C, cells] -> the same shapes."""
        mean = torch.stack([x.mean(2) for x in maps], dim=1)  # [B, P, C]
        coefficients = hard_sigmoid(self.excite(F.relu(self.squeeze(mean)))) - 0.5  # [B, P, 4 C] in -0.5..0.5
        out = []
        for x, predicted in zip(maps, coefficients[..., None].unbind(1)):
            a1, b1, a2, b2 = predicted.chunk(4, dim=1)  # [B, C, 1]
            out.append(torch.maximum(x * (2 * a1 + 1) + b1, x * (2 * a2) + b2))
        return out


class ScaleAttention(nn.Module):
    """One weight in 0..1 for a whole map, predicted from its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = Linear(channels, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps: P of [B, C, cells] -> their weights [B, P, 1]."""
        return hard_sigmoid(F.relu(self.score(torch.stack([x.mean(2) for x in maps], dim=1))))


class ChannelAttention(nn.Module):
    """A weight in 0..1 for every channel of a map, from its mean (Hu et al. 2018, "Squeeze-and-Excitation")."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        narrow = max(channels // reduction, 4)
        self.squeeze, self.excite = Linear(channels, narrow), Linear(narrow, channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps: P of [B, C, cells] -> their weights [B, P, C]."""
        return self.excite(F.relu(self.squeeze(torch.stack([x.mean(2) for x in maps], dim=1)))).sigmoid()


def hard_sigmoid(x: Tensor) -> Tensor:
    """clip(x + 3, 0, 6) / 6."""
    return (x + 3).clamp(0, 6) / 6
