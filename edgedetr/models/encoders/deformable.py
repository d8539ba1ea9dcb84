"""The deformable encoder: every cell of every level samples a few points around itself in all levels.

Zhu et al. 2021, "Deformable DETR", section 4.1 and A.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from edgedetr.layers.deformable_attention import DeformableAttention, Shapes
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.position import SinePosition
from edgedetr.models.encoders.dense import shrink
from edgedetr.models.initialization import zero_bias
from edgedetr.models.records import Memory, flatten_maps

if TYPE_CHECKING:
    from edgedetr.models.roles import Role

GROUPS = 32  # of the GroupNorm after each projection, as published; of at least two channels each


class DeformableLayer(nn.Module):
    """Deformable self-attention and feed-forward, each with a residual and a LayerNorm after it."""

    ROLES: ClassVar[dict[str, Role]] = {
        "attention.offsets": "sampling_offsets",
        "attention.weights": "attention_weights",
    }

    def __init__(
        self, attention: DeformableAttention, feedforward: FeedForward, dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention, self.feedforward = attention, feedforward
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.path = nn.Dropout(dropout), DropPath()

    def forward(self, memory: Memory, position: Tensor, centers: Tensor) -> Tensor:
        """position [1 or B, S, C] and centers [1 or B, S, 2] of the cells -> the new tokens [B, S, C]."""
        tokens = memory.tokens
        seen = self.attention(tokens + position, centers, tokens, memory.shapes, memory.padding, memory.valid)
        tokens = self.attention_norm(tokens + self.path(self.dropout(seen)))
        return self.feedforward_norm(tokens + self.path(self.feedforward(tokens)))


def deformable_encoder_layers(
    count: int,
    dim: int,
    heads: int,
    points: Sequence[int],
    feedforward: Callable[[], FeedForward],
    sampling: str = "auto",
    dropout: float = 0.0,
) -> list[nn.Module]:
    """`count` layers; points: samples per head in each level."""
    return [
        DeformableLayer(DeformableAttention(dim, heads, points, sampling), feedforward(), dim, dropout)
        for _ in range(count)
    ]


class CellPositions(nn.Module):
    """Of every cell: the sine of its position plus a learned vector of its level, and its center in the image."""

    shape_only = True

    def __init__(self, dim: int, levels: int, temperature: float = 10000.0, offset: float = 0.5) -> None:
        """temperature, offset  of the sine: see SinePosition; as in Deformable DETR"""
        super().__init__()
        self.sine = SinePosition(dim, temperature, offset)
        self.level = nn.Parameter(torch.randn(levels, dim))

    def forward(
        self, like: Tensor, shapes: Shapes, padding: Sequence[Tensor] | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Position [1 or B, S, C] and centers [1 or B, S, 2] (x, y in 0..1 of the image).

        padding  [B, H_l, W_l] bool per level;  valid [B, L, 2], fraction of each level that is image
        """
        position, dtype = [], torch.promote_types(like.dtype, torch.float32)
        for level, shape in enumerate(shapes):
            mask = None if padding is None else padding[level]
            position.append(self.sine(like, shape, mask) + self.level[level].to(like.dtype))
        return torch.cat(position, dim=1), cell_centers(like.to(dtype), shapes, valid)


def cell_centers(like: Tensor, shapes: Shapes, valid: Tensor | None = None) -> Tensor:
    """Centers of all cells, level after level, row by row: [1 or B, S, 2], x and y in 0..1 of the image.

    like   any tensor with the device and type wanted;  valid [B, L, 2]: the image ends there, and the centers of
           cells beyond it exceed 1
    """
    centers = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        center = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)[None]
        centers.append(center if valid is None else center / valid[:, level, None])
    return torch.cat(centers, dim=1)


class DeformableEncoder(nn.Module):
    """Maps of the backbone, and coarser ones made from the last of them, through deformable layers."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        dim: int,
        levels: int,
        layers: list[nn.Module],
        temperature: float = 10000.0,
        offset: float = 0.5,
    ) -> None:
        """channels, strides    of the backbone's maps, at most `levels`; the others come from stride-2 convolutions
        temperature, offset  of the cells' positions: see SinePosition
        """
        super().__init__()
        widths, steps = list(channels), list(strides)
        self.project = nn.ModuleList()
        for level in range(levels):
            extra = level >= len(channels)
            inputs = dim if level > len(channels) else widths[min(level, len(channels) - 1)]
            conv = nn.Conv2d(inputs, dim, 3, 2, 1) if extra else nn.Conv2d(inputs, dim, 1)
            nn.init.xavier_uniform_(conv.weight)
            zero_bias(conv)
            self.project.append(nn.Sequential(conv, nn.GroupNorm(math.gcd(min(GROUPS, dim // 2), dim), dim)))
            if extra:
                steps.append(2 * steps[-1])
        self.backbone_levels, self.strides = len(channels), steps[:levels]
        self.place, self.layers = CellPositions(dim, levels, temperature, offset), nn.ModuleList(layers)

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: one [B, C_l, H_l, W_l] per level of the backbone; padding [B, H, W] of the input image -> Memory."""
        levels: list[Tensor] = []
        for index, project in enumerate(self.project):
            if index < self.backbone_levels:
                levels.append(project(maps[index]))
            else:  # the first from the backbone's last map, every other from the one before it
                levels.append(project(maps[-1] if index == self.backbone_levels else levels[-1]))
        tokens, shapes = flatten_maps(levels)
        masks = flat = valid = None
        if padding is not None:
            masks = [shrink(padding, shape) for shape in shapes]
            flat = torch.cat([mask.flatten(1) for mask in masks], dim=1)
            valid = torch.stack([_image_fraction(mask) for mask in masks], dim=1)
        position, centers = self.place(tokens, shapes, masks, valid)
        # Without position: the decoder samples tokens by their location.
        memory = Memory(tokens, shapes, self.strides, padding=flat, valid=valid)
        for layer in self.layers:
            memory = replace(memory, tokens=layer(memory, position, centers))
        return memory


def _image_fraction(mask: Tensor) -> Tensor:
    """Padding [B, H, W] -> fraction of the first row and of the first column that is image: [B, 2] (x, y)."""
    seen = (~mask).float()
    return torch.stack([seen[:, 0].mean(-1), seen[:, :, 0].mean(-1)], dim=-1)
