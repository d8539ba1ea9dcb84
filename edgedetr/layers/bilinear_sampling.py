"""Sums of bilinear samples of a pyramid's maps, with gradients written out: for training on a CPU.

The same numbers as `around` and `weighted_rows` give one after the other, in one pass over memory (compiled.py). The
maps lie on one sheet between zeros, so that nothing asks which of the four cells about a place are in the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BORDER = 2  # cells of zeros: a place far outside moves to where both cells of an axis are zeros, and the slope too


@lru_cache
def compiled_here() -> bool:
    """Whether there is numba, which compiles the loops."""
    return find_spec("numba") is not None


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

    value   [B, S, M D] on a CPU: the maps' cells, map after map; all else in float32 (or all in float64)
    x, y    [B, N, M, P] places in cells of the sheet: those in the point's map, where whole numbers are cell centers,
            plus `sheet.corner`
    weight  [B, N, M, P]
    return  [B, N, M, D]
    """
    summed: Tensor = _BilinearSum.apply(value, x, y, weight, sheet)
    return summed


class _BilinearSum(torch.autograd.Function):
    """Head by head, not query by query: what a head sees of an image is small enough for a processor's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,  # type: ignore[override]
        sheet: Sheet,
    ) -> Tensor:
        from edgedetr.layers.cpu_kernels.compiled import spread, sums

        laid = sheet.laid(value, weight.shape[2])
        places = [tensor.contiguous() for tensor in (x, y, weight)]
        out = laid.new_empty(*weight.shape[:3], laid.shape[-1])
        spread(sums, len(laid) * laid.shape[1], *_arrays(laid, places, sheet), out.numpy())
        ctx.save_for_backward(laid, *places)
        ctx.sheet = sheet
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from edgedetr.layers.cpu_kernels.compiled import gradients, spread

        laid, *places = ctx.saved_tensors
        of_table, of_places = torch.zeros_like(laid), [torch.empty_like(tensor) for tensor in places]
        spread(
            gradients,
            len(laid) * laid.shape[1],
            *_arrays(laid, places, ctx.sheet),
            gradient.contiguous().numpy(),
            of_table.flatten(0, 1).flatten(1, 2).numpy(),
            *(tensor.numpy() for tensor in of_places),
        )
        return ctx.sheet.taken(of_table) if ctx.needs_input_grad[0] else None, *of_places, None


def _arrays(laid: Tensor, places: Sequence[Tensor], sheet: Sheet) -> tuple[Any, ...]:
    """What both loops begin with."""
    low, high = (bound.t().contiguous().to(laid.dtype).numpy() for bound in (sheet.low, sheet.high))
    channels = (0,) * laid.shape[-1]
    tables = laid.flatten(0, 1).flatten(1, 2).numpy()
    return channels, tables, *(tensor.numpy() for tensor in places), low, high, sheet.width
