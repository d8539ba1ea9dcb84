"""RT-DETR's hybrid encoder: attention within the coarsest level, convolutions across levels.

Zhao et al. 2024, "DETRs Beat YOLOs on Real-time Object Detection", section 4.2 and figure 4 (AIFI and CCFF).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import ConvNorm, RepVgg
from edgedetr.layers.position import GridPosition
from edgedetr.models.records import Memory, flatten_maps


class CspRep(nn.Module):
    """Two 1x1 branches of a pair of maps, one of them through RepVGG blocks, summed (the paper's fusion block)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int, activation: str) -> None:
        super().__init__()
        self.deep = ConvNorm(inputs, hidden, activation=activation)
        self.flat = ConvNorm(inputs, hidden, activation=activation)
        self.blocks = nn.Sequential(*[RepVgg(hidden, activation) for _ in range(blocks)])
        self.merge = ConvNorm(hidden, outputs, activation=activation) if hidden != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        return self.merge(self.blocks(self.deep(x)) + self.flat(x))


class HybridEncoder(nn.Module):
    """Maps of C3..C5 -> Memory of as many levels, all C channels wide."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        dim: int,
        layers: list[nn.Module],
        expansion: float,
        blocks: int,
        activation: str,
        outputs: int,
    ) -> None:
        """layers: EncoderLayers for the coarsest map; expansion, blocks: relative width and depth of each CspRep

        outputs  channels of the memory, where `dim` are those inside
        """
        super().__init__()
        levels, hidden = len(channels), int(dim * expansion)
        self.strides = list(strides)
        self.project = nn.ModuleList(ConvNorm(c, dim) for c in channels)
        self.position, self.attention = GridPosition(dim), nn.ModuleList(layers)
        steps = range(levels - 1)
        self.lateral = nn.ModuleList(ConvNorm(dim, dim, activation=activation) for _ in steps)
        self.top_down = nn.ModuleList(CspRep(2 * dim, dim, hidden, blocks, activation) for _ in steps)
        self.downsample = nn.ModuleList(ConvNorm(dim, dim, 3, 2, activation=activation) for _ in steps)
        self.bottom_up = nn.ModuleList(CspRep(2 * dim, dim, hidden, blocks, activation) for _ in steps)
        self.memory_project = nn.ModuleList(ConvNorm(dim, outputs) for _ in channels)

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: one [B, C_l, H_l, W_l] per level, finest first -> Memory."""
        if padding is not None:
            raise ModelError(
                "this encoder takes images without padding; expected one fixed size (stretch or letterbox)"
            )
        maps = [project(level) for project, level in zip(self.project, maps)]
        maps[-1] = self._within(maps[-1])
        # Coarse to fine: each map is enlarged to twice its size and fused with the next finer one.
        fine = [maps[-1]]
        for lateral, fuse, level in zip(self.lateral, self.top_down, maps[-2::-1]):
            fine[-1] = lateral(fine[-1])
            large = F.interpolate(fine[-1], scale_factor=2.0, mode="nearest")
            fine.append(fuse(torch.cat([large, level], dim=1)))
        # Fine to coarse again.
        out = [fine.pop()]
        for downsample, fuse in zip(self.downsample, self.bottom_up):
            out.append(fuse(torch.cat([downsample(out[-1]), fine.pop()], dim=1)))
        out = [project(level) for project, level in zip(self.memory_project, out)]
        for level in out:
            if level.requires_grad:
                # The gradient of a concatenation is a slice with gaps, on which BatchNorm's backward is 8 times slower.
                level.register_hook(_dense)
        tokens, shapes = flatten_maps(out)
        return Memory(tokens, shapes, self.strides)

    def _within(self, level: Tensor) -> Tensor:
        """Self-attention among the cells of one map [B, C, H, W] -> the same shape."""
        height, width = level.shape[2:]
        tokens = level.flatten(2).transpose(1, 2)
        position = self.position(tokens, (height, width))
        for layer in self.attention:
            tokens = layer(tokens, position)
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def _dense(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)
