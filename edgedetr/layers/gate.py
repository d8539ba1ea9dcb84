"""A gate that joins what a query was with what it read, each channel of both by its own weight.

Peng et al. 2024, "D-FINE", section 4.3 and the authors' code ("gateway"); it replaces a residual sum and its norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.linear import Linear


class Gate(nn.Module):
    """norm(g1 * content + g2 * read), where (g1, g2) = sigmoid(Linear(content, read)); both start at one half."""

    def __init__(self, dim: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.weights, self.norm = Linear(2 * dim, 2 * dim), norm(dim)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, content: Tensor, read: Tensor, path: DropPath) -> Tensor:
        """content, read [B, N, C] -> [B, N, C]; path: leaves the content as it was for the images that it drops."""
        of_content, of_read = self.weights(torch.cat([content, read], dim=-1)).sigmoid().chunk(2, dim=-1)
        joined: Tensor = self.norm(path.change(content, of_content * content + of_read * read))
        return joined
