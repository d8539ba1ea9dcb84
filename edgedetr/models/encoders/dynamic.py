"""The encoder layer of Dynamic DETR: every level becomes a weighted sum of itself and its neighbors.

Dai et al. 2021, "Dynamic DETR", section 3.2, after the authors' "Dynamic Head" (Dai et al. 2021), section 3. The
offsets of a level steer the deformable convolutions of all that flows into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.deformable_convolution import MASKS, OFFSETS, TAPS, DeformRead, Source
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.dynamic_convolution import ChannelAttention, DynamicRelu, ScaleAttention
from edgedetr.layers.linear import Linear
from edgedetr.models.initialization import zero_bias
from edgedetr.options import one_of

if TYPE_CHECKING:
    from edgedetr.models.roles import Role

GROUPS = 16  # of the normalization after each convolution (Dynamic Head)


class DynamicPyramidLayer(nn.Module):
    """Deformable convolutions within and across levels, a weight for each, and a dynamic ReLU of their mean.

    One set of weights for all levels, so all levels are convolved in one call. The coarser neighbor is enlarged
    before its convolution, not after it: an offset belongs to a cell of this level, and there are four of those per
    coarse cell (Dynamic Head leaves it to its kernel to read only the offsets that it needs).
    Stochastic depth leaves a layer out as a whole: the maps of such an image go through it unchanged.
    """

    ROLES: ClassVar[dict[str, Role]] = {"offset": "sampling_offsets", "activation": "dynamic_relu"}

    def __init__(
        self,
        dim: int,
        dynamic_relu: bool = True,
        sampling: str = "auto",
        scale_attention: Literal["scalar", "channel"] = "scalar",
    ) -> None:
        """scale_attention  how much of each map goes into the mean: one number (Dynamic Head), or one per channel by
        squeeze-and-excitation (Dynamic DETR)
        """
        super().__init__()
        one_of("model.scale_attention", scale_attention, ("scalar", "channel"))
        self.offset = nn.Conv2d(dim, OFFSETS + MASKS, 3, padding=1)
        self.read = DeformRead(sampling)
        self.same, self.finer, self.coarser = (Linear(TAPS * dim, dim) for _ in range(3))
        self.same_norm, self.finer_norm, self.coarser_norm = (nn.GroupNorm(GROUPS, dim) for _ in range(3))
        self.scale = ChannelAttention(dim) if scale_attention == "channel" else ScaleAttention(dim)
        self.activation = DynamicRelu(dim) if dynamic_relu else None
        self.path = DropPath()
        # Taps begin near the cells of a plain 3x3 convolution (Dynamic Head's code).
        nn.init.normal_(self.offset.weight, std=0.01)
        zero_bias(self.offset)
        for linear in (self.same, self.finer, self.coarser):
            bound = (TAPS * dim) ** -0.5
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One [B, C, H_l, W_l] per level, finest first -> the same shapes."""
        levels, shapes = len(maps), [(level.shape[2], level.shape[3]) for level in maps]
        cells = [height * width for height, width in shapes]
        large = [
            F.interpolate(level, size=shape, mode="bilinear", align_corners=False)
            for level, shape in zip(maps[1:], shapes)
        ]
        table = torch.cat([level.flatten(2).transpose(1, 2) for level in maps + large], dim=1)
        offsets = torch.cat([self.offset(level).flatten(2) for level in maps], dim=2).transpose(1, 2)  # [B, S, 27]
        total, first, last = sum(cells), cells[0], cells[-1]
        offsets = torch.cat([offsets, offsets[:, first:], offsets[:, : total - last]], dim=1)
        offset, mask = offsets.split([OFFSETS, MASKS], dim=2)
        starts = [sum(cells[:level]) for level in range(levels)]
        sources = [Source(shape, start, shape) for shape, start in zip(shapes, starts)]
        sources += [Source(shapes[level - 1], starts[level - 1], shapes[level], 2) for level in range(1, levels)]
        sources += [Source(shapes[level], total + starts[level], shapes[level]) for level in range(levels - 1)]
        read = self.read(table, sources, offset, mask.sigmoid()).split([total, total - first, total - last], dim=1)
        # By level: itself, the finer neighbor, the coarser one, [B, C, cells] each.
        parts = [[level] for level in self._normed(self.same, self.same_norm, read[0], cells)]
        for level, part in enumerate(self._normed(self.finer, self.finer_norm, read[1], cells[1:])):
            parts[level + 1].append(part)
        for level, part in enumerate(self._normed(self.coarser, self.coarser_norm, read[2], cells[:-1])):
            parts[level].append(part)
        weight = self.scale([part for several in parts for part in several]).split(1, dim=1)
        if isinstance(self.scale, ChannelAttention):
            weight = [one.transpose(1, 2) for one in weight]  # [B, C, 1]
        weights = iter(weight)
        out = []
        for several in parts:
            weighted = [part * next(weights) for part in several]
            out.append(sum(weighted[1:], weighted[0]) / len(several))
        out = [level.relu() for level in out] if self.activation is None else self.activation(out)
        if self.training and self.path.rate:
            before, after = torch.cat([level.flatten(2) for level in maps], dim=2), torch.cat(out, dim=2)
            out = list((before + self.path(after - before)).split(cells, dim=2))  # one decision for all levels
        return [level.unflatten(2, shape) for level, shape in zip(out, shapes)]

    @staticmethod
    def _normed(linear: nn.Linear, norm: nn.GroupNorm, read: Tensor, cells: list[int]) -> list[Tensor]:
        """The sum over the taps, normalized level by level: [B, C, cells] each."""
        return [norm(level) for level in linear(read).transpose(1, 2).split(cells, dim=2)]
