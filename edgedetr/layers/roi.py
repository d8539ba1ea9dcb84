"""RoIAlign over a pyramid: the content of a box as a small square of features, read from the level that fits its size.

He et al. 2017, "Mask R-CNN", section 3; the level of a box: Lin et al. 2017, "Feature Pyramid Networks", eq. 1.
All boxes are read from one table of all levels' tokens by one gather, so that no level is pooled in vain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]

# A box with the area of a square of 14 cells' side belongs to a level: 224 px at stride 16, ImageNet's picture (FPN).
CELLS = 14.0


class RoiAlign(nn.Module):
    """`size` x `size` bins per box, each the mean of `samples` x `samples` bilinear points; half-pixel coordinates.

    A point more than a cell outside the map reads zero, one nearer than that reads the border cell: the standard's
    operator RoiAlign with coordinate_transformation_mode "half_pixel".
    """

    def __init__(self, size: int = 7, samples: int = 2) -> None:
        super().__init__()
        self.size, self.samples = size, samples

    def forward(self, tokens: Tensor, shapes: Shapes, strides: Sequence[int], boxes: Tensor) -> Tensor:
        """Gradients reach the tokens, not the boxes.

        tokens  [B, S, C]  level after level, finest first, row by row; shapes [(H_l, W_l)]; strides in pixels
        boxes   [B, N, 4]  cx, cy, w, h in 0..1 of the picture; may reach beyond it
        return  [B, N, size * size, C], bins row by row
        """
        batch, rows = tokens.shape[:2]
        boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
        pixels = boxes.new_tensor([shapes[0][1] * strides[0], shapes[0][0] * strides[0]]).repeat(2)
        boxes = boxes * pixels                                              # cx, cy, w, h in pixels
        level = level_of(boxes, strides)                                    # [B, N]
        starts = [sum(h * w for h, w in shapes[:index]) for index in range(len(shapes))]
        table = boxes.new_tensor([[float(w), float(h), 1.0 / stride, float(start)]
                                  for (h, w), stride, start in zip(shapes, strides, starts)])
        width, height, scale, start = F.embedding(level, table).unbind(-1)  # [B, N] each
        centre, extent = (boxes * scale[..., None]).split(2, dim=-1)
        x, x_weight = self._axis(centre[..., 0], extent[..., 0], width)     # [B, N, size, 2 * samples]
        y, y_weight = self._axis(centre[..., 1], extent[..., 1], height)
        # Every bin reads the cells of its rows times those of its columns: [B, N, size, size, 2 samples, 2 samples].
        cell = y[:, :, :, None, :, None] * width[:, :, None, None, None, None] + x[:, :, None, :, None, :]
        cell = cell + start[:, :, None, None, None, None]
        weight = y_weight[:, :, :, None, :, None] * x_weight[:, :, None, :, None, :]
        first = torch.arange(batch, device=tokens.device)[:, None, None, None] * rows
        index = cell.flatten(4).flatten(2, 3).long() + first                # [B, N, bins, 4 samples^2]
        weight = weight.flatten(4).flatten(2, 3).to(tokens.dtype)
        read = F.embedding(index, tokens.flatten(0, 1))                     # [B, N, bins, 4 samples^2, C]
        return (weight.unsqueeze(-2) @ read).squeeze(-2)

    def _axis(self, centre: Tensor, extent: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Along one axis: the two cells about each sample, and their weights in the mean of the bin.

        centre, extent, cells  [B, N]  of the box in cells of its level; cells of that level
        return                 [B, N, size, 2 * samples] cell numbers and weights
        """
        count = self.size * self.samples
        step = (torch.arange(count, device=centre.device, dtype=centre.dtype) + 0.5) / count - 0.5
        place = centre[..., None] + extent[..., None] * step - 0.5          # cell centres are whole numbers
        last = cells[..., None] - 1
        inside = ((place >= -1) & (place <= last + 1)).to(place.dtype) / self.samples
        place = torch.minimum(place.clamp(min=0), last)
        low = place.floor()
        high = torch.minimum(low + 1, last)
        part = place - low
        cell = torch.stack([low, high], dim=-1)                             # [B, N, count, 2]
        weight = torch.stack([(1 - part) * inside, part * inside], dim=-1)
        return (item.flatten(2).unflatten(2, (self.size, -1)) for item in (cell, weight))  # type: ignore[return-value]  # a pair


def level_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Index of the level that a box is read from: floor(4 + log2(sqrt(area) / 224)), kept within the pyramid.

    boxes   [..., 4]  cx, cy, w, h in pixels
    return  [...] int64, 0 for the finest level
    """
    # The area against each level's smallest one: exact where a logarithm can fall on either side of a whole number.
    area = boxes[..., 2] * boxes[..., 3]
    level = torch.zeros_like(area, dtype=torch.int64)
    for stride in strides[1:]:
        level = level + (area >= (CELLS * stride) ** 2).long()
    return level
