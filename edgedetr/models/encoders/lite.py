"""DEIMv2's lite encoder: one map of the backbone and a coarser one made from it, without attention.

Huang et al. 2025, "Real-Time Object Detection Meets DINOv3", section 3 (its sizes Atto, Femto and Pico).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import ConvNorm
from edgedetr.models.encoders.hybrid import RepElan, elan_width, keep_gradients_dense
from edgedetr.models.records import Memory, flatten_maps


class LiteEncoder(nn.Module):
    """One map of stride s -> Memory of two levels, of strides s and 2 s, both C channels wide."""

    def __init__(self, channels: int, stride: int, dim: int, expansion: float, blocks: int, activation: str) -> None:
        """expansion, blocks: width of the fusion blocks relative to `dim`, and RepVGG blocks in each half of them"""
        super().__init__()
        self.strides = [stride, 2 * stride]
        self.project = ConvNorm(channels, dim)
        self.coarser, self.downsample = (
            nn.Sequential(nn.AvgPool2d(3, 2, 1), ConvNorm(dim, dim, activation=activation)) for _ in range(2)
        )
        self.mix = ConvNorm(dim, dim, activation=activation)
        self.top_down, self.bottom_up = (
            RepElan(dim, dim, elan_width(dim, expansion), blocks, activation, smooth=True) for _ in range(2)
        )

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: one [B, C, H, W] -> Memory."""
        if padding is not None:
            raise ModelError(
                "this encoder takes images without padding; expected one fixed size (stretch or letterbox)"
            )
        fine = self.project(maps[0])
        coarse = self.coarser(fine)
        coarse = self.mix(coarse + coarse.mean((2, 3), keepdim=True))  # what is in the whole image reaches every cell
        fine = self.top_down(fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        tokens, shapes = flatten_maps(keep_gradients_dense([fine, self.bottom_up(coarse + self.downsample(fine))]))
        return Memory(tokens, shapes, self.strides)
