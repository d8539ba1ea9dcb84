"""Rows of a batch of tables by index, as one Gather on axis 0, which every runtime does fast; bilinear corners."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batched_gather(table: Tensor, index: Tensor) -> Tensor:
    """table[b, index[b, n]] for every b and n.

    table   [B, S, C]
    index   [B, N]  int64, 0 .. S-1
    return  [B, N, C]
    """
    batch, rows = table.shape[:2]
    start = torch.arange(batch, device=index.device)[:, None] * rows
    return F.embedding(index + start, table.flatten(0, 1))


def bilinear_corners(position: Tensor, cells: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two cells next to a position along one axis, and their bilinear weights; a cell outside the map weighs 0.

    Without comparisons: positions are clamped to one cell outside the map, so that the two cells low <= high are the
    same cell exactly where the outer one is missing, and (high - low) is its weight of 0 or 1.

    position  in cells, whole numbers are cell centers
    cells     of the map along that axis
    return    low, high, weight of low, weight of high; gradients reach the weights
    """
    position = position.clamp(min=-1)
    if isinstance(cells, Tensor):
        position, last = torch.minimum(position, cells), cells - 1
    else:
        position, last = position.clamp(max=cells), position.new_tensor(cells - 1)
    below = position.detach().floor()
    low, high = torch.minimum(below.clamp(min=0), last), torch.minimum(below + 1, last)
    distance = position - low
    return low, high, 1 - distance.abs(), distance * (high - low)
