"""The position-wise feed-forward of a transformer layer, and the small MLP of the heads."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.conv import ACTIVATIONS
from edgedetr.layers.linear import Linear


class FeedForward(nn.Module):
    """Linear(C, hidden) -> activation -> Linear(hidden, C), with dropout after each."""

    def __init__(self, dim: int, hidden: int, activation: str = "relu", dropout: float = 0.0,
                 activation_dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = Linear(dim, hidden), Linear(hidden, dim)
        self.activation = ACTIVATIONS[activation]()
        if isinstance(self.activation, (nn.ReLU, nn.SiLU)):
            # What a Linear gives for [B, N, C] is a view, and the gradient of a change in place copies all of it.
            self.activation.inplace = False
        self.dropout, self.activation_dropout = nn.Dropout(dropout), nn.Dropout(activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        return self.dropout(self.down(self.activation_dropout(self.activation(self.up(x)))))


class Mlp(nn.Module):
    """`layers` Linears with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == 0 else layer(F.relu(x))
        return x
