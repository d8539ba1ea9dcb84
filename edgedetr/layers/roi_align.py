"""RoIAlign over a pyramid: a small square of features for each box, sampled from the level that fits its size.

He et al. 2017, "Mask R-CNN", section 3; the level of a box: Lin et al. 2017, "Feature Pyramid Networks", eq. 1.
One gather samples all boxes from one table of all levels' tokens, so that no level is pooled without need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.cpu_kernels.weighted_rows import weighted_rows

Shapes = Sequence[tuple[int, int]]

# A box with the area of a square of 14 cells' side belongs to a level: 224 px at stride 16, ImageNet's image (FPN).
CELLS = 14.0


class RoiAlign(nn.Module):
    """`size` x `size` bins per box, each the mean of `samples` x `samples` bilinear points; half-pixel coordinates.

    A point more than a cell outside the map is zero, a nearer one is the border cell, as in ONNX's
    operator RoiAlign with coordinate_transformation_mode "half_pixel".
    """

    def __init__(self, size: int = 7, samples: int = 2) -> None:
        super().__init__()
        self.size, self.samples = size, samples

    def forward(self, tokens: Tensor, shapes: Shapes, strides: Sequence[int], boxes: Tensor) -> Tensor:
        """Gradients reach the tokens, not the boxes.

        tokens  [B, S, C]  level after level, finest first, row by row; shapes [(H_l, W_l)]; strides in pixels
        boxes   [B, N, 4]  cx, cy, w, h in 0..1 of the image; may reach beyond it
        return  [B, N, size * size, C], bins row by row
        """
        batch, rows = tokens.shape[:2]
        boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
        pixels = boxes.new_tensor([shapes[0][1] * strides[0], shapes[0][0] * strides[0]]).repeat(2)
        boxes = boxes * pixels  # cx, cy, w, h in pixels
        starts = [sum(h * w for h, w in shapes[:index]) for index in range(len(shapes))]
        table = boxes.new_tensor(
            [[float(w), float(h), 1.0 / stride, float(start)] for (h, w), stride, start in zip(shapes, strides, starts)]
        )
        cells, scale, start = F.embedding(level_of(boxes, strides), table).split([2, 1, 1], dim=-1)
        center, extent = (boxes * scale).split(2, dim=-1)  # [B, N, 2] in cells of the box's level
        cell, weight = self._along(center, extent, cells)  # [B, N, 2, 2 samples * size]
        column, row = cell.split(1, dim=2)
        first = torch.arange(batch, device=tokens.device, dtype=boxes.dtype)[:, None, None] * rows
        row = row.squeeze(2) * cells[..., :1] + (start + first)  # first token of the row, in the whole batch
        # Every bin reads the cells of its rows times those of its columns; at most five dimensions, for TensorRT.
        bins, reads = self.size, 2 * self.samples
        index = row.reshape(-1, bins, 1, reads, 1) + column.reshape(-1, 1, bins, 1, reads)
        across, down = weight.to(tokens.dtype).split(1, dim=2)
        weight = down.reshape(-1, bins, 1, reads, 1) * across.reshape(-1, 1, bins, 1, reads)
        index, weight = index.long().reshape(-1, bins**2, reads**2), weight.reshape(-1, bins**2, reads**2)
        return weighted_rows(tokens.flatten(0, 1), index, weight).reshape(batch, -1, bins**2, tokens.shape[2])

    def _along(self, center: Tensor, extent: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Along both axes: the two cells next to each sample, and their weights in the mean of the bin.

        center, extent, cells  [B, N, 2]  x, y of the box in cells of its level; cells of that level
        return                 [B, N, 2, 2 * samples * size] cell numbers and weights, bin after bin
        """
        count = self.size * self.samples
        step = (torch.arange(count, device=center.device, dtype=center.dtype) + 0.5) / count - 0.5
        position = center[..., None] + (extent[..., None] * step - 0.5)  # cell centers are whole numbers
        cells = cells[..., None]
        last = cells - 1
        inside = ((position >= -1) & (position <= cells)).to(position.dtype) / self.samples
        position = torch.minimum(position.clamp(min=0), last)
        low = position.floor()
        part = (position - low) * inside
        cell = torch.stack([low, torch.minimum(low + 1, last)], dim=-1)
        return cell.flatten(3), torch.stack([inside - part, part], dim=-1).flatten(3)


def level_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Index of the level that a box is sampled from: floor(4 + log2(sqrt(area) / 224)), kept within the pyramid.

    boxes   [..., 4]  cx, cy, w, h in pixels
    return  [...] int64, 0 for the finest level
    """
    # The area against each level's smallest one: exact where a logarithm can fall on either side of a whole number.
    least = boxes.new_tensor([(CELLS * stride) ** 2 for stride in strides[1:]])
    return (boxes[..., 2:3] * boxes[..., 3:] >= least).long().sum(-1)
