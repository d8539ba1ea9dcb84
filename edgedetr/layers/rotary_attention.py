"""Attention whose queries and keys are turned by the position of their patch, along y and x (2-d RoPE).

Su et al. 2021, "RoFormer", section 3.2; along two axes: Simeoni et al. 2025, "DINOv3", section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgedetr.layers.attention import attend
from edgedetr.layers.linear import Linear


class RotaryPosition(nn.Module):
    """The angles by which the pairs of a head's channels turn; tokens that are no patches do not turn.

    A pair is a channel of the first half and one of the second: (a, b) -> (a cos - b sin, b cos + a sin).

    It depends only on the shape, so deployment replaces the module by its outputs.
    """

    shape_only = True

    def __init__(self, width: int, before: int, base: float = 100.0) -> None:
        """width  channels of a head, a multiple of 4; before: tokens in front of the patches

        base  the slowest of width / 4 frequencies is nearly so many times slower than the fastest
        """
        super().__init__()
        self.width, self.before, self.base = width, before, base

    def forward(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """shape (h, w) in patches -> cosine, and sine with the minus of the first half; float32, on the CPU.

        return  each [before + h * w, width]
        """
        frequencies = self.base ** -torch.arange(0, 1, 4 / self.width)  # [width / 4]
        y, x = ((torch.arange(side) + 0.5) / side * 2 - 1 for side in shape)  # centers of the patches, -1..1
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # [h * w, 2]
        angles = (2 * math.pi * centers[:, :, None] * frequencies).flatten(1).repeat(1, 2)  # [h * w, width]
        angles = torch.cat([torch.zeros(self.before, self.width), angles])
        sine = angles.sin()
        sine[:, : self.width // 2].neg_()
        return angles.cos(), sine


class RotaryAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v per head among the tokens of one image, with q and k turned."""

    def __init__(self, dim: int, heads: int, key_bias: bool = True) -> None:
        super().__init__()
        self.heads, self.width, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.q, self.v, self.out = (Linear(dim, dim) for _ in range(3))
        self.k = Linear(dim, dim, bias=key_bias)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [B, N, C]; cosine, sine [N, C / heads] of RotaryPosition -> [B, N, C]."""
        q, k, v = (self._split(part(x)) for part in (self.q, self.k, self.v))  # [B, M, N, D]
        q, k = (turned(part, cosine, sine, self.width) for part in (q, k))
        return self.out(attend(q, k, v, None, self.scale).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)


def turned(x: Tensor, cosine: Tensor, sine: Tensor, width: int) -> Tensor:
    """The pairs of channels of x [..., N, width] turned by the angles of RotaryPosition, [N, width]."""
    # width is a number and not read from x: an exported graph then has slices with constant ends.
    exchanged = torch.cat([x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    result = x * cosine + exchanged * sine
    return result if result.dtype == x.dtype else result.to(x.dtype)  # the angles are float32, under autocast as well
