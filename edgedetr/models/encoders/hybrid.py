"""Hybrid encoders: attention within the coarsest level, convolutions across levels.

Zhao et al. 2024, "DETRs Beat YOLOs on Real-time Object Detection", section 4.2 and figure 4 (AIFI and CCFF); with other
convolutions across levels: Peng et al. 2024, "D-FINE", section 5.1 and appendix, and Huang et al. 2025, "DEIMv2".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.convolution import ConvNorm, RepVgg, SeparableConvNorm
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.position import GridPosition
from edgedetr.models.encoders.dense import EncoderLayer
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


class RepElan(nn.Module):
    """One map in two halves, the second through two CspReps in a row; all four maps are concatenated and mixed.

    D-FINE's and DEIMv2's fusion block (RepNCSPELAN4), after Wang et al. 2024, "YOLOv9", section 4.2 (GELAN).
    """

    def __init__(self, inputs: int, outputs: int, inner: int, blocks: int, activation: str, smooth: bool) -> None:
        """inner, blocks  channels and RepVGG blocks of each CspRep; smooth: a 3x3 convolution follows each"""
        super().__init__()
        # Two convolutions, where the authors have one and split its output: deployed graphs then need no split.
        self.keep, self.deep = (ConvNorm(inputs, outputs, activation=activation) for _ in range(2))
        self.first, self.second = (
            nn.Sequential(
                CspRep(channels, inner, inner, blocks, activation),
                ConvNorm(inner, inner, 3, activation=activation) if smooth else nn.Identity(),
            )
            for channels in (outputs, inner)
        )
        self.merge = ConvNorm(2 * outputs + 2 * inner, outputs, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        maps = [self.keep(x), self.deep(x)]
        for part in (self.first, self.second):
            maps.append(part(maps[-1]))
        return self.merge(torch.cat(maps, dim=1))


@dataclass(frozen=True)
class FusionParts:
    """What a hybrid encoder has between its levels; every call makes a new module.

    lateral     a map of C channels before it is enlarged -> C
    fuse        two neighbors, concatenated (2 C channels) or added (C) -> C
    downsample  C channels -> C at half the size
    summed      whether the neighbors are added
    """

    lateral: Callable[[], nn.Module]
    fuse: Callable[[], nn.Module]
    downsample: Callable[[], nn.Module]
    summed: bool = False


def rt_detr_fusion(dim: int, expansion: float, blocks: int, activation: str) -> FusionParts:
    """expansion, blocks: width of each fusion block relative to `dim`, and its number of RepVGG blocks."""
    return FusionParts(
        partial(ConvNorm, dim, dim, activation=activation),
        partial(CspRep, 2 * dim, dim, int(dim * expansion), blocks, activation),
        partial(ConvNorm, dim, dim, 3, 2, activation=activation),
    )


def d_fine_fusion(
    dim: int, expansion: float, blocks: int, activation: str, *, summed: bool = False, smooth: bool = True
) -> FusionParts:
    """D-FINE's parts; `summed` for DEIMv2, and `smooth` False for its sizes on vision transformers."""
    return FusionParts(
        partial(ConvNorm, dim, dim),
        partial(RepElan, dim if summed else 2 * dim, dim, elan_width(dim, expansion), blocks, activation, smooth),
        partial(SeparableConvNorm, dim, dim, 3, 2),
        summed,
    )


def elan_width(dim: int, expansion: float) -> int:
    """Channels inside a RepElan, rounded as the authors do: down to a whole number after halving."""
    return round(expansion * dim // 2)


def layers_of_coarsest(
    count: int, dim: int, heads: int, hidden: int, activation: str, dropout: float
) -> list[nn.Module]:
    """The layers of attention within the coarsest map.

    hidden, activation  inside the feed-forward
    """
    return [
        EncoderLayer(
            MultiHeadAttention(dim, heads, dropout), FeedForward(dim, hidden, activation, dropout), dim, dropout
        )
        for _ in range(count)
    ]


class HybridEncoder(nn.Module):
    """Maps of a backbone's levels -> Memory of as many levels, all C channels wide."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        dim: int,
        layers: list[nn.Module],
        parts: FusionParts,
        outputs: int | None,
        project: bool = True,
    ) -> None:
        """layers: EncoderLayers for the coarsest map

        outputs  channels of the memory, to which each level is projected; None: they are the `dim` inside, as they are
        project  the backbone's maps are projected to `dim` channels; False: they have as many and are taken as they are
        """
        super().__init__()
        steps = range(len(channels) - 1)
        self.strides, self.summed = list(strides), parts.summed
        self.project = nn.ModuleList(ConvNorm(c, dim) if project else nn.Identity() for c in channels)
        self.position, self.attention = GridPosition(dim), nn.ModuleList(layers)
        self.lateral = nn.ModuleList(parts.lateral() for _ in steps)
        self.top_down = nn.ModuleList(parts.fuse() for _ in steps)
        self.downsample = nn.ModuleList(parts.downsample() for _ in steps)
        self.bottom_up = nn.ModuleList(parts.fuse() for _ in steps)
        self.memory_project = nn.ModuleList(
            nn.Identity() if outputs is None else ConvNorm(dim, outputs) for _ in channels
        )

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
            fine.append(fuse(self._join(large, level)))
        # Fine to coarse again.
        out = [fine.pop()]
        for downsample, fuse in zip(self.downsample, self.bottom_up):
            out.append(fuse(self._join(downsample(out[-1]), fine.pop())))
        out = [project(level) for project, level in zip(self.memory_project, out)]
        tokens, shapes = flatten_maps(keep_gradients_dense(out))
        return Memory(tokens, shapes, self.strides)

    def _join(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other if self.summed else torch.cat(keep_gradients_dense([one, other]), dim=1)

    def _within(self, level: Tensor) -> Tensor:
        """Self-attention among the cells of one map [B, C, H, W] -> the same shape."""
        height, width = level.shape[2:]
        tokens = level.flatten(2).transpose(1, 2)
        position = self.position(tokens, (height, width))
        for layer in self.attention:
            tokens = layer(tokens, position)
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def keep_gradients_dense(maps: list[Tensor]) -> list[Tensor]:
    """The maps, which are about to be concatenated: their gradients come back without gaps.

    The gradient of a concatenation is a slice with gaps, on which the backward passes of BatchNorm and of enlarging a
    map are 8 times slower.
    """
    for level in maps:
        if level.requires_grad:
            level.register_hook(_dense)
    return maps


def _dense(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)
