"""Dynamic DETR's encoder layer: every level is a sum of itself and its neighbours, as it asks for.

Dai et al. 2021, "Dynamic DETR", section 3.2, after the authors' "Dynamic Head" (Dai et al. 2021), section 3. The offsets
of a level steer the deformable convolutions of all that flows into it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.deform_conv import MASKS, OFFSETS, DeformConv
from edgedetr.layers.dynamic import DynamicRelu, ScaleAttention

GROUPS = 16         # of the normalisation after each convolution (Dynamic Head)


class DynamicPyramidLayer(nn.Module):
    """Deformable convolutions within and across levels, a weight for each, and a dynamic ReLU of their mean.

    One set of weights for all levels. The coarser neighbour is enlarged before its convolution, not after it: an offset
    belongs to a cell of this level, and there are four of those per coarse cell (Dynamic Head leaves it to its kernel to
    read only the offsets that it needs).
    """

    def __init__(self, dim: int, dynamic_relu: bool = True, sampling: str = "grid_sample") -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, OFFSETS + MASKS, 3, padding=1)
        self.same, self.coarser, self.finer = (DeformConv(dim, dim, stride, sampling) for stride in (1, 1, 2))
        self.same_norm, self.coarser_norm, self.finer_norm = (nn.GroupNorm(GROUPS, dim) for _ in range(3))
        self.scale = ScaleAttention(dim)
        self.activation = DynamicRelu(dim) if dynamic_relu else nn.ReLU()

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One [B, C, H_l, W_l] per level, finest first -> the same shapes."""
        out = []
        for level, features in enumerate(maps):
            offset, mask = self.offset(features).split([OFFSETS, MASKS], dim=1)
            mask = mask.sigmoid()
            parts = [self.same_norm(self.same(features, offset, mask))]
            if level > 0:
                parts.append(self.finer_norm(self.finer(maps[level - 1], offset, mask)))
            if level + 1 < len(maps):
                large = F.interpolate(maps[level + 1], size=features.shape[2:], mode="bilinear", align_corners=False)
                parts.append(self.coarser_norm(self.coarser(large, offset, mask)))
            weighted = [self.scale(part) for part in parts]
            out.append(self.activation(torch.stack(weighted).mean(0)))
        return out
