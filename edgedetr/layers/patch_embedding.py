"""Patches of an image: their position embedding, and windows of them.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1; windows: Li et al. 2022, "ViTDet", section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchPosition(nn.Module):
    """A learned vector per patch of a square grid, and one for the class token; other grids are interpolated.

    Without padding it depends only on the shape, so deployment replaces the module by its output.
    """

    shape_only = True

    def __init__(self, dim: int, grid: int, class_token: bool) -> None:
        """grid  patches per side of the images of pretraining (224 px / 16)"""
        super().__init__()
        self.grid, self.class_token = grid, class_token
        self.table = nn.Parameter(torch.empty(1, class_token + grid * grid, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, shape: tuple[int, int]) -> Tensor:
        """shape (h, w) in patches -> [1, (1 +) h * w, C], the class token's first."""
        if shape == (self.grid, self.grid):
            return self.table
        first, cells = self.table.split([int(self.class_token), self.grid**2], dim=1)
        square = cells.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        # float32: a CPU has no bicubic interpolation in half precision, and this is computed once.
        resized = F.interpolate(square.float(), size=shape, mode="bicubic", align_corners=False).to(cells.dtype)
        return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


def to_windows(tokens: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """Tokens of a map, row by row, as windows; the map is padded with zeros at the right and the bottom.

    tokens  [B, h * w, C];  shape (h, w)
    return  [B * windows, side * side, C]
    """
    height, width = shape
    x = tokens.unflatten(1, shape)
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    columns = -(-width // side)
    # At most four dimensions: a row of a window, with its channels, moves as one.
    x = x.reshape(-1, side, columns, side * tokens.shape[2]).transpose(1, 2)  # [B rows, columns, side, side C]
    return x.reshape(-1, side * side, tokens.shape[2])


def from_windows(windows: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """The inverse of `to_windows`: [B * windows, side * side, C] -> [B, h * w, C]."""
    height, width = shape
    rows, columns = -(-height // side), -(-width // side)
    channels = windows.shape[2]
    x = windows.reshape(-1, columns, side, side * channels).transpose(1, 2)  # [B rows, side, columns, side C]
    x = x.reshape(-1, rows * side, columns * side, channels)
    return x[:, :height, :width].flatten(1, 2)
