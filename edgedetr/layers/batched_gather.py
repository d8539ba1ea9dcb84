"""Rows of a batch of tables by index, as one Gather on axis 0: the form every runtime does fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[b, index[b, n]] for every b and n.

    table   [B, S, C]
    index   [B, N]  int64, 0 .. S-1
    return  [B, N, C]
    """
    batch, rows = table.shape[:2]
    start = torch.arange(batch, device=index.device)[:, None] * rows
    return F.embedding(index + start, table.flatten(0, 1))


def around(place: Tensor, cells: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two cells about a place along one axis, and their bilinear weights; a cell outside the map weighs 0.

    Without comparisons: places are clamped to one cell outside the map, so that the two cells low <= high coincide
    exactly where the outer one is missing, and (high - low) is its weight of 0 or 1.

    place   in cells, whole numbers are cell centers;  cells  of the map along that axis
    return  low, high, weight of low, weight of high; gradients reach the weights
    """
    place = place.clamp(min=-1)
    if isinstance(cells, Tensor):
        place, last = torch.minimum(place, cells), cells - 1
    else:
        place, last = place.clamp(max=cells), place.new_tensor(cells - 1)
    below = place.detach().floor()
    low, high = torch.minimum(below.clamp(min=0), last), torch.minimum(below + 1, last)
    near = place - low
    return low, high, 1 - near.abs(), near * (high - low)
