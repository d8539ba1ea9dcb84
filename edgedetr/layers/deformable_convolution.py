"""The sampling half of a deformable 3x3 convolution: nine taps at learned offsets, each with a weight.

Zhu et al. 2019, "Deformable ConvNets v2", section 3.1. The other half is a Linear over the nine taps' channels, so that
it can be quantized and needs no operator that runtimes lack. One call samples several maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.batched_gather import bilinear_corners
from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype, is_eager_fp32
from edgedetr.layers.cpu_kernels.weighted_rows import weighted_rows
from edgedetr.layers.deformable_attention import SAMPLINGS
from edgedetr.options import one_of

TAPS = 9
OFFSETS, MASKS = 2 * TAPS, TAPS  # predicted per cell: y, x of each tap; the weight of each tap


@dataclass(frozen=True)
class Source:
    """A map within a table of tokens, and the grid of cells that sample it.

    shape   (H, W) of the map
    start   its first row in the table
    out     (h, w) of the grid; cell (i, j) samples around cell (stride i, stride j) of the map
    """

    shape: tuple[int, int]
    start: int
    out: tuple[int, int]
    stride: int = 1


class TapPositions(nn.Module):
    """Positions of the taps without offsets; they depend on the shapes only."""

    shape_only = True

    def forward(self, sources: Sequence[Source], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> row and column [Q, 9] of every tap in cells of its map; height, width and start [Q, 1] of that map."""
        kind = torch.promote_types(like.dtype, torch.float32)  # half precision cannot count cells
        tap = torch.arange(3, device=like.device, dtype=kind) - 1
        rows, columns, maps = [], [], []
        for source in sources:
            (height, width), (h, w) = source.shape, source.out
            row = torch.arange(h, device=like.device, dtype=kind).repeat_interleave(w) * source.stride
            column = torch.arange(w, device=like.device, dtype=kind).repeat(h) * source.stride
            rows.append(row[:, None] + tap.repeat_interleave(3))
            columns.append(column[:, None] + tap.repeat(3))
            numbers = torch.tensor([[height, width, source.start]], device=like.device, dtype=kind)
            maps.append(numbers.expand(h * w, -1))
        size = torch.cat(maps)
        return torch.cat(rows), torch.cat(columns), size[:, :1], size[:, 1:2], size[:, 2:]


class DeformRead(nn.Module):
    """`sampling`: "grid_sample" (torch's own), "gather" (row gathers), or "auto" (the faster one); the same result."""

    def __init__(self, sampling: str = "auto") -> None:
        super().__init__()
        one_of("model.sampling", sampling, SAMPLINGS)
        self.sampling, self.positions = sampling, TapPositions()

    def forward(self, table: Tensor, sources: Sequence[Source], offset: Tensor, mask: Tensor) -> Tensor:
        """The taps' samples for every cell; outside of a map they are zero.

        table    [B, S, C]   maps, one after the other, row by row
        offset   [B, Q, 18]  y, x of every tap in cells of its map, grid after grid in the order of `sources`
        mask     [B, Q, 9]   weight of every tap, 0..1
        return   [B, Q, 9 C]  tap after tap, row by row
        """
        if autocast_dtype(table):  # the kernels without copies are float32 only
            table = table.float()
        row, column, height, width, start = self.positions(sources, offset)
        move = offset.to(row.dtype).unflatten(-1, (TAPS, 2))
        row, column = row + move[..., 0], column + move[..., 1]  # [B, Q, 9]
        if self.sampling == "grid_sample" or (self.sampling == "auto" and not is_eager_fp32(table)):
            read = self._grid_sample(table, sources, (2 * column + 1) / width - 1, (2 * row + 1) / height - 1)
            return (read * mask.to(table.dtype)[..., None]).flatten(2)
        batch, rows = table.shape[:2]
        y0, y1, wy0, wy1 = bilinear_corners(row, height)
        x0, x1, wx0, wx1 = bilinear_corners(column, width)
        first = torch.arange(batch, device=table.device)[:, None, None, None] * rows
        cell = torch.stack([start + y * width + x for y in (y0, y1) for x in (x0, x1)], dim=-1).long() + first
        weight = torch.stack([wy * wx * mask for wy in (wy0, wy1) for wx in (wx0, wx1)], dim=-1).to(table.dtype)
        return weighted_rows(table.flatten(0, 1), cell, weight).flatten(2)

    def _grid_sample(self, table: Tensor, sources: Sequence[Source], x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, Q, 9] in -1..1 of each map -> [B, Q, 9, C]."""
        read, grids = [], torch.stack([x, y], dim=-1).to(table.dtype)
        for source, grid in zip(sources, grids.split([item.out[0] * item.out[1] for item in sources], dim=1)):
            height, width = source.shape
            level = table[:, source.start : source.start + height * width].transpose(1, 2).unflatten(2, source.shape)
            sample = F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            read.append(sample.permute(0, 2, 3, 1))  # [B, h w, 9, C]
        return torch.cat(read, dim=1)
