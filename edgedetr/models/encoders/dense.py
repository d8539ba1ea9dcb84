"""The dense transformer encoder over one feature map: DETR's, and the layer that RT-DETR uses within one level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.row_column_attention import AxisPosition
from edgedetr.models.initialization import zero_bias
from edgedetr.models.records import Memory, with_pos_embed


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a LayerNorm after (post) or before (pre) it."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        feedforward: FeedForward,
        dim: int,
        dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention, self.feedforward, self.pre_norm = attention, feedforward, pre_norm
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.path = nn.Dropout(dropout), DropPath()

    def forward(self, tokens: Tensor, position: Tensor | None, padding: Tensor | None = None) -> Tensor:
        """tokens [B, S, C], position [1 or B, S, C] or None, padding [B, S] (True = padding) -> [B, S, C]."""
        mask = None if padding is None else padding[:, None, None]
        inner = self.attention_norm(tokens) if self.pre_norm else tokens
        query = with_pos_embed(inner, position)
        tokens = tokens + self.path(self.dropout(self.attention(query, query, inner, mask)))
        if self.pre_norm:
            return tokens + self.path(self.feedforward(self.feedforward_norm(tokens)))
        tokens = self.attention_norm(tokens)
        return self.feedforward_norm(tokens + self.path(self.feedforward(tokens)))


class DenseEncoder(nn.Module):
    """The coarsest map, projected to C channels, through dense encoder layers."""

    def __init__(
        self,
        channels: int,
        stride: int,
        dim: int,
        position: nn.Module,
        layers: list[nn.Module],
        norm: nn.Module,
        position_scale: nn.Module | None = None,
        once: bool = False,
    ) -> None:
        """channels        of the backbone's map
        norm            after the last layer (pre-LN) or nn.Identity
        position_scale  C -> C: the tokens scale their own position, anew in every layer (DAB-DETR); None: unscaled
        once            the position is added to the input alone, and no layer adds it again (DETR, table 3)
        """
        super().__init__()
        self.position_scale, self.once = position_scale, once
        self.project = nn.Conv2d(channels, dim, 1)
        self.position, self.layers, self.norm, self.stride = position, nn.ModuleList(layers), norm, stride
        nn.init.xavier_uniform_(self.project.weight)
        zero_bias(self.project)

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: the last is used; padding [B, H, W] of the input image -> Memory of one level."""
        tokens, shape, padding, flat = _tokens(self.project(maps[-1]), padding)
        position = self.position(tokens, shape, padding)
        if self.once:
            tokens, position = tokens + position, None
        for layer in self.layers:
            scaled = position if self.position_scale is None else position * self.position_scale(tokens)
            tokens = layer(tokens, scaled, flat)
        return Memory(self.norm(tokens), [shape], [self.stride], position=position, padding=flat)


class RowColumnEncoder(nn.Module):
    """The coarsest map, projected and normalized to C channels, through row-column layers (Anchor DETR)."""

    def __init__(self, channels: int, stride: int, dim: int, position: AxisPosition, layers: list[nn.Module]) -> None:
        super().__init__()
        # 32 groups of 8 channels, as published; fewer where C is not a multiple of 32.
        project = nn.Conv2d(channels, dim, 1)
        self.project = nn.Sequential(project, nn.GroupNorm(math.gcd(32, dim), dim))
        self.position, self.layers, self.stride = position, nn.ModuleList(layers), stride
        nn.init.xavier_uniform_(project.weight)
        zero_bias(project)

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: the last is used; padding [B, H, W] of the input image -> Memory of one level, with axes."""
        tokens, shape, padding, flat = _tokens(self.project(maps[-1]), padding)
        axes = self.position(tokens, shape, padding)
        for layer in self.layers:
            tokens = layer(tokens, axes, shape, flat)
        return Memory(tokens, [shape], [self.stride], padding=flat, axes=axes)


def _tokens(features: Tensor, padding: Tensor | None) -> tuple[Tensor, tuple[int, int], Tensor | None, Tensor | None]:
    """One map [B, C, H_l, W_l], padding [B, H, W] of the image -> tokens, (H_l, W_l), the level's padding, [B, S]."""
    shape = (features.shape[2], features.shape[3])
    tokens = features.flatten(2).transpose(1, 2)  # [B, S, C]
    if padding is None:
        return tokens, shape, None, None
    padding = shrink(padding, shape)
    return tokens, shape, padding, padding.flatten(1)


def shrink(padding: Tensor, shape: tuple[int, int]) -> Tensor:
    """A padding mask [B, H, W] at a level's size [B, H_l, W_l]: the nearest pixel decides."""
    return F.interpolate(padding[None].float(), size=shape)[0].to(torch.bool)
