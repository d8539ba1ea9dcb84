"""Position embeddings: the position of a feature map's cell as a vector that attention adds to queries and keys.

Every class maps `shape` (H, W) and an optional padding mask to [1 or B, H*W, C]; tokens run row by row. Without a
mask the result depends on the shape alone (`shape_only`), so deployment replaces the module by its output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError


def sine(positions: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Sine embedding of numbers: sine and cosine interleaved, with wavelengths from 1 to `temperature`.

    positions  [..., P]  1 is a full turn of the fastest wave
    return     [..., P * width]  position after position
    """
    turns = [2 * math.pi / temperature ** (2 * pair / width) for pair in range(width // 2)]
    angle = positions[..., None] * torch.tensor(turns, device=positions.device, dtype=positions.dtype)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def sine_of_boxes(reference: Tensor, width: int) -> Tensor:
    """Sine embedding of points or boxes, y first as in SinePosition; in float32 or better.

    reference  [..., 2|4]  cx, cy(, w, h) in 0..1
    width      numbers per coordinate
    return     [..., 2|4 * width]
    """
    x, y = reference[..., :1], reference[..., 1:2]
    positions = torch.cat([y, x, reference[..., 2:]], dim=-1)
    return sine(positions.to(torch.promote_types(positions.dtype, torch.float32)), width)


class SinePosition(nn.Module):
    """Interleaved sine and cosine of the cell's position among the unmasked cells, y first (DETR, section A.4)."""

    shape_only = True

    def __init__(self, dim: int, temperature: float = 10000.0, offset: float = 0.0) -> None:
        """offset  subtracted from the 1-based cell number: 0 for DETR, 0.5 for Deformable DETR"""
        super().__init__()
        self.per_axis, self.temperature, self.offset = dim // 2, temperature, offset

    def forward(self, like: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """like: any tensor with the device and type of the result; padding [B, H, W] bool -> [1 or B, H*W, C]."""
        seen = torch.ones(1, *shape, device=like.device) if padding is None else (~padding).float()
        y, x = seen.cumsum(1), seen.cumsum(2)
        eps = 1e-6  # a row or column that is all padding
        y = (y - self.offset) / (y[:, -1:, :] + eps) * 2 * math.pi
        x = (x - self.offset) / (x[:, :, -1:] + eps) * 2 * math.pi
        power = torch.arange(self.per_axis, device=like.device) // 2 * 2 / self.per_axis
        wave = self.temperature**power  # [C/2]
        parts = []
        for axis in (y, x):
            angle = axis[..., None] / wave  # [B, H, W, C/2]
            parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2))
        return torch.cat(parts, dim=-1).flatten(1, 2).to(like.dtype)


class GridPosition(nn.Module):
    """[sin y, cos y, sin x, cos x] of the cell's row and column number, each C/4 wide: RT-DETR's encoder."""

    shape_only = True

    def __init__(self, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"{dim} channels; a 2-d sine position needs a multiple of 4")
        self.quarter, self.temperature = dim // 4, temperature

    def forward(self, like: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """-> [1, H*W, C]; padding does not change it."""
        wave = self.temperature ** (-torch.arange(self.quarter, device=like.device, dtype=torch.float64) / self.quarter)
        y = torch.arange(shape[0], device=like.device, dtype=torch.float64).repeat_interleave(shape[1])[:, None] * wave
        x = torch.arange(shape[1], device=like.device, dtype=torch.float64).repeat(shape[0])[:, None] * wave
        return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)[None].to(like.dtype)


class LearnedPosition(nn.Module):
    """One learned vector per column and per row, concatenated, x first (DETR's `learned`, also 50 of each)."""

    shape_only = True

    def __init__(self, dim: int, cells: int = 50) -> None:
        """cells  largest number of rows or columns; 50 is 1600 px at stride 32"""
        super().__init__()
        self.row, self.column = nn.Embedding(cells, dim // 2), nn.Embedding(cells, dim // 2)
        nn.init.uniform_(self.row.weight)
        nn.init.uniform_(self.column.weight)

    def forward(self, like: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """-> [1, H*W, C]; padding does not change it."""
        height, width = shape
        if max(shape) > len(self.row.weight):
            raise ModelError(
                f"model.position 'learned' has vectors for {len(self.row.weight)} rows and "
                f"columns, and the map has {height} x {width} cells; use a smaller input, or "
                "--set model.position=sine"
            )
        x = self.column.weight[:width].repeat(height, 1)
        y = self.row.weight[:height].repeat_interleave(width, dim=0)
        return torch.cat([x, y], dim=1)[None]


class SequencePosition(nn.Module):
    """One learned vector per token number (ViT's 1-d position)."""

    shape_only = True

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, like: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """-> [1, H*W, C]; padding does not change it."""
        tokens = shape[0] * shape[1]
        if tokens > self.table.shape[1]:
            raise ModelError(
                f"model.position 'sequence' has vectors for {self.table.shape[1]} cells, and the map has "
                f"{shape[0]} x {shape[1]}; use a smaller input, or --set model.position=sine"
            )
        return self.table[:, :tokens]


class NoPosition(nn.Module):
    """Zero: the tokens are a set (DETR, ablation in table 3)."""

    shape_only = True

    def forward(self, like: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """like [B, S, C] -> zeros [1, 1, C]."""
        return torch.zeros(1, 1, like.shape[-1], device=like.device, dtype=like.dtype)
