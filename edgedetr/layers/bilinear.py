"""Sums of bilinear samples of a pyramid's maps, with gradients written out: for training on a CPU.

The same numbers as `around` and `weighted_rows` give one after the other, without autograd's record of every step
between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgedetr.layers.rows import sum_rows, table_gradient, weight_gradient


@dataclass(frozen=True)
class Grid:
    """Where each point's map lies in a table of one row per picture, token and head.

    size    [P, 2]         cells of the point's map, x then y
    stride  [P] int32      rows of the table from one row of cells to the next
    first   [B, 1, M, P] int32   row of the table of the point's first cell
    step    int            rows of the table from one cell to the next
    """

    size: Tensor
    stride: Tensor
    first: Tensor
    step: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], points: Sequence[int], batch: int, heads: int) -> Grid:
        """The maps of a pyramid, (H, W) each, one after the other, and how many points of a head look at each."""
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        tokens = sum(h * w for h, w in shapes)
        per_point = [(w, h, start) for (h, w), start, count in zip(shapes, starts, points) for _ in range(count)]
        width, height, start = torch.tensor(per_point, dtype=torch.int32).unbind(-1)
        row = torch.arange(batch, dtype=torch.int32)[:, None, None, None] * tokens + start          # [B, 1, 1, P]
        first = row * heads + torch.arange(heads, dtype=torch.int32)[:, None]
        return cls(torch.stack([width, height], dim=-1).float(), width * heads, first, heads)


def bilinear_sum(table: Tensor, x: Tensor, y: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """Per head, the weighted sum of what its points see; outside a map there are zeros.

    table   [B S M, D] float32 on a CPU: a row per picture, token and head
    x, y    [B, N, M, P] places in cells of the point's map; whole numbers are cell centres
    weight  [B, N, M, P]
    return  [B, N, M, D]
    """
    summed: Tensor = _BilinearSum.apply(table, x, y, weight, grid)
    return summed


class _BilinearSum(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, table: Tensor, x: Tensor, y: Tensor, weight: Tensor,  # type: ignore[override]
                grid: Grid) -> Tensor:
        columns, share_x, slope_x = _two_cells(x, grid.size[:, 0])
        rows, share_y, slope_y = _two_cells(y, grid.size[:, 1])                     # each [B, N, M, 2, P]
        rows = rows * grid.stride + grid.first.unsqueeze(-2)
        index = rows.unsqueeze(-2) + (columns * grid.step).unsqueeze(-3)            # [B, N, M, 2 of y, 2 of x, P]
        weights = (share_y * weight.unsqueeze(-2)).unsqueeze(-2) * share_x.unsqueeze(-3)
        index, weights = index.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)           # [B N M, 4 P]
        ctx.save_for_backward(table, weight, index, weights, share_x, slope_x, share_y, slope_y)
        return sum_rows(table, index, weights).unflatten(0, x.shape[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        table, weight, index, weights, share_x, slope_x, share_y, slope_y = ctx.saved_tensors
        gradient = gradient.flatten(0, 2)
        pictures = len(weight)
        of_table = (table_gradient(index, weights, gradient, len(table), pictures) if ctx.needs_input_grad[0]
                    else None)
        if not any(ctx.needs_input_grad[1:4]):
            return of_table, None, None, None, None
        seen = weight_gradient(index, table, gradient)                              # of a sample's four cells
        seen = seen.view(*weight.shape[:3], 2, 2, weight.shape[-1])
        across, down = share_x.unsqueeze(-3), share_y.unsqueeze(-2)
        rows = _mixed(seen[..., 0, :], across[..., 0, :], seen[..., 1, :], across[..., 1, :])      # [B, N, M, 2, P]
        columns = _mixed(seen[..., 0, :, :], down[..., 0, :, :], seen[..., 1, :, :], down[..., 1, :, :])
        of_x, of_y, of_weight = (_mixed(pair[..., 0, :], share[..., 0, :], pair[..., 1, :], share[..., 1, :])
                                 for pair, share in ((columns, slope_x), (rows, slope_y), (rows, share_y)))
        return of_table, of_x.mul_(weight), of_y.mul_(weight), of_weight, None


def _mixed(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    return (a * of_a).addcmul_(b, of_b)


def _two_cells(place: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells about each place along one axis, as `around` finds them: [..., P] and [P] -> [..., 2, P] each.

    int32 cells, their bilinear weights, and how these change with the place (at a centre: as just above it)
    """
    place, last = torch.minimum(place.clamp(min=-1), cells), cells - 1
    below = place.floor()
    pair, share, slope = (place.new_empty(*place.shape[:-1], 2, place.shape[-1]) for _ in range(3))
    low = torch.minimum(below.clamp(min=0), last, out=pair[..., 0, :])
    high = torch.minimum(below.add_(1), last, out=pair[..., 1, :])
    near = place.sub_(low)
    both = torch.sub(high, low, out=slope[..., 1, :])                               # 0 where one cell is outside
    torch.mul(near, both, out=share[..., 1, :])
    of_low = torch.sub(1, near.abs(), out=share[..., 0, :])
    torch.copysign(of_low.ceil(), near.neg_(), out=slope[..., 0, :])                # 0 where clamped: nothing is near
    return pair.int(), share, slope
