"""Patches of an image: their position embedding, and windows of them.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1; windows: Li et al. 2022, "ViTDet", section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchPosition(nn.Module):
    """A learned vector per patch of a square grid, and one for the class token; other grids are interpolated.

    Without padding it depends only on the shape, so deployment replaces the module by its output.
    """

    shape_only = True

    def __init__(self, dim: int, grid: int, class_token: bool, antialias: bool = False) -> None:
        """grid  patches per side of the images of pretraining (224 px / 16)

        antialias  interpolated as RF-DETR does: a smaller grid is averaged; by default as DINO and ViTDet do
        """
        super().__init__()
        self.grid, self.class_token, self.antialias = grid, class_token, antialias
        self.table = nn.Parameter(torch.empty(1, class_token + grid * grid, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, shape: tuple[int, int]) -> Tensor:
        """shape (h, w) in patches -> [1, (1 +) h * w, C], the class token's first."""
        return self._resized(self.table, self.grid, shape)

    def fitted(self, table: Tensor) -> Tensor:
        """A table of any square grid [1, (1 +) g * g, C] for the grid of this module; anything else as it is."""
        side = math.isqrt(max(table.shape[1] - self.class_token, 0)) if table.dim() == 3 else 0
        if not side or side**2 + self.class_token != table.shape[1]:
            return table
        return self._resized(table, side, (self.grid, self.grid))

    def _resized(self, table: Tensor, side: int, shape: tuple[int, int]) -> Tensor:
        if shape == (side, side):
            return table
        first, cells = table.split([int(self.class_token), side**2], dim=1)
        square = cells.transpose(1, 2).unflatten(2, (side, side))
        # float32: a CPU has no bicubic interpolation in half precision, and this is computed once.
        resized = F.interpolate(
            square.float(), size=shape, mode="bicubic", align_corners=False, antialias=self.antialias
        ).to(cells.dtype)
        return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


def to_windows(tokens: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """Tokens of a map, row by row, as windows; the map is padded with zeros at the right and the bottom.

    tokens  [B, h * w, C];  shape (h, w)
    return  [B * windows, side * side, C]
    """
    height, width = shape
    x = tokens.unflatten(1, shape)
    rows, columns = _windows(height, side), _windows(width, side)
    x = F.pad(x, (0, 0, 0, columns * side - width, 0, rows * side - height))
    return _cut(x, columns, (side, side))


def from_windows(windows: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """The inverse of `to_windows`: [B * windows, side * side, C] -> [B, h * w, C]."""
    height, width = shape
    rows, columns = _windows(height, side), _windows(width, side)
    channels = windows.shape[2]
    x = _joined(windows, columns, (side, side)).reshape(-1, rows * side, columns * side, channels)
    return x[:, :height, :width].flatten(1, 2)


def split_windows(tokens: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    """Tokens of a map, row by row, as count x count windows of one size.

    tokens  [B, h * w, C];  shape (h, w), both multiples of count
    return  [B * count * count, h * w / count^2, C], the windows of an image row by row
    """
    return _cut(tokens, count, (shape[0] // count, shape[1] // count))


def merge_windows(windows: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    """The inverse of `split_windows`: [B * count * count, n, C] -> [B, h * w, C]."""
    joined = _joined(windows, count, (shape[0] // count, shape[1] // count))
    return joined.reshape(-1, shape[0] * shape[1], windows.shape[2])


def _windows(cells: int, side: int) -> int:
    """Windows of `side` that hold so many cells.

    In torch's tracing `cells` is a tensor: rounding a negative quotient up, as -(-a // b), kills its exporter, which
    divides by the 0 that it takes for the result.
    """
    return (cells + side - 1) // side


# At most four dimensions: a row of a window, with its channels, moves as one.
def _cut(cells: Tensor, columns: int, window: tuple[int, int]) -> Tensor:
    """Cells [..., C], row by row, of maps of `columns` windows side by side -> [B * windows, h * w, C]."""
    height, width = window
    x = cells.reshape(-1, height, columns, width * cells.shape[-1]).transpose(1, 2)  # [B rows, columns, h, w C]
    return x.reshape(-1, height * width, cells.shape[-1])


def _joined(windows: Tensor, columns: int, window: tuple[int, int]) -> Tensor:
    """The inverse of `_cut` -> [B rows, h, columns, w C], the order of the map's rows."""
    height, width = window
    return windows.reshape(-1, columns, height, width * windows.shape[2]).transpose(1, 2)
