"""Sums of bilinear samples of a pyramid's maps, with gradients written out: for training on a CPU.

The same numbers as `around` and `weighted_rows` give one after the other, with a third of their passes over memory: the
maps lie on one sheet between zeros, so that nothing asks which of the four cells about a place are in the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgedetr.layers.rows import sum_rows, table_gradient, weight_gradient

BORDER = 2      # cells of zeros: a place far outside moves to where both cells of an axis are zeros, and the slope too


@dataclass(frozen=True)
class Sheet:
    """The maps of a pyramid side by side, the widest on the left and the others under each other beside it.

    height, width   of the sheet in cells
    shapes          [(H, W)] of the maps, corners their (top, left) on the sheet
    corner          [P, 2]  left and top of the map that a point looks at
    low, high       [P, 2]  x and y of the least and the greatest place that is told from those beyond it
    """

    height: int
    width: int
    shapes: list[tuple[int, int]]
    corners: list[tuple[int, int]]
    corner: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], points: Sequence[int], like: Tensor) -> Sheet:
        """The maps (H, W) of a pyramid, and how many points of a head look at each; like: a tensor of places."""
        widest = max(range(len(shapes)), key=lambda level: shapes[level][1])
        corners, top, left, width = [], BORDER, shapes[widest][1] + 2 * BORDER, 0
        for level, (rows, columns) in enumerate(shapes):
            if level == widest:
                corners.append((BORDER, BORDER))
            else:
                corners.append((top, left))
                top, width = top + rows + BORDER, max(width, columns + BORDER)
        per_point = [(x, y, w, h) for (h, w), (y, x), count in zip(shapes, corners, points) for _ in range(count)]
        corner, size = like.new_tensor(per_point).split(2, dim=-1)
        height = max(top, shapes[widest][0] + 2 * BORDER)
        return cls(height, left + width, list(shapes), corners, corner, corner - BORDER, corner + size)

    def laid(self, value: Tensor, heads: int) -> Tensor:
        """value [B, S, M D], map after map -> a sheet for each head, [B, M, height, width, D] in float32 or float64."""
        depth = value.shape[-1] // heads
        kind = torch.promote_types(value.dtype, torch.float32)
        sheet = value.new_zeros(len(value), heads, self.height, self.width, depth, dtype=kind)
        for cells, place in self._pairs(value, sheet):
            place.copy_(cells)
        return sheet

    def taken(self, sheet: Tensor) -> Tensor:
        """The sheets [B, M, height, width, D] -> [B, S, M D], map after map."""
        pictures, heads, *_, depth = sheet.shape
        value = sheet.new_empty(pictures, sum(rows * columns for rows, columns in self.shapes), heads * depth)
        for cells, place in self._pairs(value, sheet):
            cells.copy_(place)
        return value

    def _pairs(self, value: Tensor, sheet: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each map's cells as they are in `value` and on the sheets, both [B, M, H, W, D]."""
        maps = value.split([rows * columns for rows, columns in self.shapes], dim=1)
        for cells, (rows, columns), (top, left) in zip(maps, self.shapes, self.corners):
            cells = cells.unflatten(1, (rows, columns)).unflatten(-1, (sheet.shape[1], sheet.shape[-1]))
            yield cells.permute(0, 3, 1, 2, 4), sheet[:, :, top : top + rows, left : left + columns]


def bilinear_sum(value: Tensor, x: Tensor, y: Tensor, weight: Tensor, sheet: Sheet) -> Tensor:
    """Per head, the weighted sum of what its points see; outside a map there are zeros.

    value   [B, S, M D] on a CPU: the maps' cells, map after map; all else in float32
    x, y    [B, N, M, P] places in cells of the sheet: those in the point's map, where whole numbers are cell centres,
            plus `sheet.corner`
    weight  [B, N, M, P]
    return  [B, N, M, D]
    """
    summed: Tensor = _BilinearSum.apply(value, x, y, weight, sheet)
    return summed


class _BilinearSum(torch.autograd.Function):
    """Head by head, not query by query: what a head sees of a picture is small enough for a processor's cache."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, y: Tensor, weight: Tensor,  # type: ignore[override]
                sheet: Sheet) -> Tensor:
        weight = weight.transpose(1, 2).contiguous()                                # [B, M, N, P]
        laid = sheet.laid(value, weight.shape[1])
        table = laid.view(-1, laid.shape[-1])                                       # a row per picture, head and cell
        index, shares, right, down = _cells(x.transpose(1, 2), y.transpose(1, 2), weight, sheet)
        ctx.save_for_backward(table, weight, index, shares, right, down)
        ctx.sheet, ctx.laid = sheet, laid.shape
        return sum_rows(table, index, shares).unflatten(0, weight.shape[:3]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        table, weight, index, shares, right, down = ctx.saved_tensors
        gradient, of_value = gradient.transpose(1, 2).flatten(0, 2), None           # [B M N, D]
        pictures, heads = weight.shape[:2]
        if ctx.needs_input_grad[0]:
            of_table = table_gradient(index, shares, gradient, len(table), pictures if pictures > 1 else heads)
            of_value = ctx.sheet.taken(of_table.view(ctx.laid))
        if not any(ctx.needs_input_grad[1:4]):
            return of_value, None, None, None, None
        seen = weight_gradient(index, table, gradient).view(*weight.shape[:3], 4, -1)   # of the samples' four cells
        of_x, of_y, of_weight = (torch.empty_like(weight) for _ in range(3))
        for picture in range(pictures):
            above, above_right, under, under_right = seen[picture].unbind(-2)
            across, across_under = above_right - above, under_right - under
            above = torch.addcmul(above, across, right[picture])
            under = torch.addcmul(under, across_under, right[picture]).sub_(above)
            torch.addcmul(above, under, down[picture], out=of_weight[picture])
            torch.mul(under, weight[picture], out=of_y[picture])
            torch.addcmul(across, across_under.sub_(across), down[picture], out=of_x[picture]).mul_(weight[picture])
        return of_value, *(tensor.transpose(1, 2) for tensor in (of_x, of_y, of_weight)), None


def _cells(x: Tensor, y: Tensor, weight: Tensor, sheet: Sheet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four cells about each place [B, M, N, P], picture by picture, which a processor's cache holds.

    int32 rows of the table, and the cells' shares of the sum, [B M N, 4 P] each; how far right and down of the first of
    its four cells a place is, [B, M, N, P] each
    """
    pictures, heads, queries, points = weight.shape
    line, area = sheet.width, sheet.height * sheet.width
    index = weight.new_empty(pictures, heads, queries, 4, points, dtype=torch.int32)
    shares, right, down = weight.new_empty(index.shape), torch.empty_like(weight), torch.empty_like(weight)
    head = torch.arange(heads, dtype=torch.int32)[:, None, None] * area
    for picture in range(pictures):
        across = torch.clamp(x[picture], sheet.low[:, 0], sheet.high[:, 0], out=right[picture])
        along = torch.clamp(y[picture], sheet.low[:, 1], sheet.high[:, 1], out=down[picture])
        column, row = across.floor(), along.floor()
        across.sub_(column)
        along.sub_(row)
        first = row.int().mul_(line).add_(column.int()).add_(head + picture * heads * area)
        first.clamp_(0, pictures * heads * area - line - 2)     # NaN is in no cell; whatever it reads, the sum is NaN
        for cell, offset in enumerate((0, 1, line, line + 1)):
            torch.add(first, offset, out=index[picture, :, :, cell])
        above, above_right, under, under_right = shares[picture].unbind(-2)
        lower = weight[picture] * along
        upper = weight[picture] - lower
        torch.sub(lower, torch.mul(lower, across, out=under_right), out=under)
        torch.sub(upper, torch.mul(upper, across, out=above_right), out=above)
    return index.flatten(3).flatten(0, 2), shares.flatten(3).flatten(0, 2), right, down
