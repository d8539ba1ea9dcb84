"""3x3 convolution whose nine taps look where they are told to, each with a weight of its own.

Zhu et al. 2019, "Deformable ConvNets v2", section 3.1. The taps are read by bilinear samples, and one 1x1 convolution
over nine times the channels sums them: standard operators, and the convolution can be quantised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.gather import around

TAPS = 9
OFFSETS, MASKS = 2 * TAPS, TAPS     # channels of what tells the taps: y, x of each tap; the weight of each tap


class DeformConv(nn.Module):
    """`sampling` "grid_sample" (torch's own) or "gather" (row gathers): two ways to the same numbers."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, sampling: str = "grid_sample") -> None:
        super().__init__()
        self.stride, self.sampling = stride, sampling
        self.mix = nn.Conv2d(TAPS * inputs, outputs, 1)     # channel by channel, its nine taps row by row
        nn.init.uniform_(self.mix.weight, -(TAPS * inputs) ** -0.5, (TAPS * inputs) ** -0.5)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Cell (i, j) of the result looks about cell (stride i, stride j) of x; outside x is zero.

        x       [B, C, H, W]
        offset  [B, 18, h, w]  y, x of every tap, in cells of x
        mask    [B, 9, h, w]   weight of every tap, 0..1
        return  [B, C', h, w]
        """
        height, width = offset.shape[2:]
        kind = torch.promote_types(offset.dtype, torch.float32)     # a place in half precision is cells off
        move_y, move_x = offset.to(kind).unflatten(1, (TAPS, 2)).unbind(2)          # [B, 9, h, w]
        row = torch.arange(height, device=x.device, dtype=kind)[:, None] * self.stride - 1
        column = torch.arange(width, device=x.device, dtype=kind) * self.stride - 1
        tap = torch.arange(3, device=x.device, dtype=kind)
        y = move_y + (row + tap.repeat_interleave(3)[:, None, None])                # [B, 9, h, w] in cells of x
        x_ = move_x + (column + tap.repeat(3)[:, None, None])
        read = self._grid_sample(x, y, x_) if self.sampling == "grid_sample" else self._gather(x, y, x_)
        return self.mix((read * mask[:, None]).flatten(1, 2))

    def _grid_sample(self, x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """-> [B, C, 9, h, w]."""
        height, width = x.shape[2:]
        place = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1).flatten(1, 2)
        read = F.grid_sample(x, place.to(x.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
        return read.unflatten(2, (TAPS, -1))

    def _gather(self, x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """-> [B, C, 9, h, w]."""
        batch, _, height, width = x.shape
        y0, y1, wy0, wy1 = around(row, height)
        x0, x1, wx0, wx1 = around(column, width)
        first = torch.arange(batch, device=x.device)[:, None, None, None, None] * (height * width)
        cell = torch.stack([y * width + c for y in (y0, y1) for c in (x0, x1)], dim=-1).long() + first
        weight = torch.stack([wy * wx for wy in (wy0, wy1) for wx in (wx0, wx1)], dim=-1).to(x.dtype)
        table = x.flatten(2).transpose(1, 2).flatten(0, 1)                          # [B H W, C]
        read = weight.flatten(1, 3).unsqueeze(-2) @ F.embedding(cell.flatten(1, 3), table)      # [B, 9 h w, 1, C]
        return read.squeeze(2).transpose(1, 2).unflatten(2, row.shape[1:])
