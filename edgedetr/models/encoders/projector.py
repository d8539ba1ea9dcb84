"""Projector of LW-DETR and RF-DETR: the maps of several blocks, all of one stride, to levels of C channels.

Chen et al. 2024, "LW-DETR", section 3.2 (YOLOv8's C2f between encoder and decoder; P4 alone, or P3 and P5). RF-DETR has
LayerNorm where LW-DETR has BatchNorm: it does not depend on the batch, and cannot be folded for deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import ConvNorm
from edgedetr.layers.norm import ChannelNorm
from edgedetr.models.records import Memory, flatten_maps
from edgedetr.models.roles import Role

EPS = 1e-6  # of every LayerNorm
BLOCKS = 3  # in each C2f
WIDE = 512  # channels from which enlarging starts with a 1x1 convolution to half of them
Norm = Callable[[int], nn.Module]


class C2f(nn.Module):
    """A 1x1 convolution to two halves; blocks of two 3x3 follow each other on the second; all parts are merged."""

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        half = outputs // 2
        self.spread = ConvNorm(inputs, 2 * half, activation="silu", norm=norm)
        self.blocks = nn.ModuleList(
            nn.Sequential(*[ConvNorm(half, half, 3, activation="silu", norm=norm) for _ in range(2)])
            for _ in range(BLOCKS)
        )
        self.merge = ConvNorm((2 + BLOCKS) * half, outputs, activation="silu", norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        parts = list(self.spread(x).chunk(2, dim=1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat(parts, dim=1))


class MultiScaleProjector(nn.Module):
    """Maps [B, C_l, H, W] of one stride -> one map [B, C, scale * H, scale * W] for each scale."""

    def __init__(self, channels: Sequence[int], scales: Sequence[float], dim: int, norm: Norm) -> None:
        """scales  2, 1 or 0.5 for each level: half, the same or twice the stride of the maps"""
        super().__init__()
        self.sampling = nn.ModuleList(nn.ModuleList(_sampling(c, scale, norm) for c in channels) for scale in scales)
        self.fuse = nn.ModuleList(C2f(sum(_sampled(c, scale) for c in channels), dim, norm) for scale in scales)
        self.norms = nn.ModuleList(ChannelNorm(dim, EPS) for _ in scales)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = []
        for sampling, fuse, norm in zip(self.sampling, self.fuse, self.norms):
            sampled = [resize(level) for resize, level in zip(sampling.children(), maps)]
            levels.append(norm(fuse(torch.cat(sampled, dim=1))))
        return levels


class ProjectorEncoder(nn.Module):
    """Maps of a windowed transformer -> Memory, by the projector alone: these detectors have no other encoder."""

    ROLES: ClassVar[dict[str, Role]] = {"project": "projector"}

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], scales: Sequence[float], dim: int, norm: str
    ) -> None:
        """channels, strides: of the maps, all of one stride; scales as in MultiScaleProjector

        norm  "batch" (LW-DETR) or "layer" (RF-DETR)
        """
        super().__init__()
        if norm not in NORMS:
            raise ModelError(f"norm is {norm!r}; expected {' or '.join(NORMS)}")
        self.project = MultiScaleProjector(channels, scales, dim, NORMS[norm])
        self.strides = [round(strides[0] / scale) for scale in scales]

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: one [B, C_l, H, W] per block that is read -> Memory."""
        if padding is not None:
            raise ModelError(
                "this encoder takes images without padding; expected one fixed size (stretch or letterbox)"
            )
        tokens, shapes = flatten_maps(self.project(maps))
        return Memory(tokens, shapes, self.strides)


def _layer_norm(channels: int) -> nn.Module:
    return ChannelNorm(channels, EPS)


NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "layer": _layer_norm}


def _sampled(channels: int, scale: float) -> int:
    """Channels of a map after `_sampling`."""
    return channels if scale != 2 else channels // 4 if channels > WIDE else channels // 2


def _sampling(channels: int, scale: float, norm: Norm) -> nn.Sequential:
    """From the stride of the maps to that of a level."""
    if scale not in (2, 1, 0.5):
        raise ModelError(f"a level at {scale} times the size of the maps; expected 2, 1 or 0.5")
    if scale == 2 and channels > WIDE:
        narrow = ConvNorm(channels, channels // 2, activation="relu", norm=norm)
        return nn.Sequential(narrow, nn.ConvTranspose2d(channels // 2, channels // 4, 2, 2))
    if scale == 2:
        return nn.Sequential(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
    return nn.Sequential(*[ConvNorm(channels, channels, 3, 2, activation="relu", norm=norm)][: scale != 1])
