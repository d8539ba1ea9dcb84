"""DEIMv2's backbone: a vision transformer of DINOv3's kind, and convolutions beside it for detail (STA).

Huang et al. 2025, "Real-Time Object Detection Meets DINOv3" (DEIMv2), section 3.1: the spatial tuning adapter; Simeoni
et al. 2025, "DINOv3". Read in Intellindust-AI-Lab/DEIMv2 (engine/backbone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import ConvNorm
from edgedetr.layers.feedforward import FeedForward, GatedFeedForward
from edgedetr.layers.rotary_attention import RotaryAttention, RotaryPosition
from edgedetr.models.backbones.vit import EPS, PATCH, VitBlock, freeze_trunk, layers_above
from edgedetr.models.backbones.vit_designs import ROTARY_DESIGNS, RotaryDesign
from edgedetr.models.initialization import zero_bias
from edgedetr.models.roles import Role

NAMES = tuple(ROTARY_DESIGNS)
LEVELS = (3, 4, 5)  # strides 8, 16, 32
REGISTERS, PRETRAINED_EPS, PRETRAINED_SCALE = 4, 1e-5, 1e-5  # of Meta's weights (DINOv3)


class RotaryVit(nn.Module):
    """Images to the maps of three blocks at stride 16; positions turn queries and keys, and are no embedding."""

    def __init__(self, design: RotaryDesign, layer_scale: float = 0.0) -> None:
        """layer_scale  start of the factors on the residual branches; 0 = the design's"""
        super().__init__()
        d = design
        registers = REGISTERS if d.pretrained else 0
        eps, scale = (PRETRAINED_EPS, layer_scale or PRETRAINED_SCALE) if d.pretrained else (EPS, layer_scale)
        self.patch = nn.Conv2d(3, d.dim, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.empty(1, 1, d.dim))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, d.dim)) if registers else None
        self.before = 1 + registers
        self.position = RotaryPosition(d.dim // d.heads, self.before)

        def block() -> VitBlock:
            feedforward = GatedFeedForward(d.dim, 4 * d.dim) if d.gated else FeedForward(d.dim, 4 * d.dim, "gelu")
            attention = RotaryAttention(d.dim, d.heads, key_bias=not d.pretrained)
            return VitBlock(d.dim, d.heads, 0, scale, attention=attention, feedforward=feedforward, eps=eps)

        self.maps = d.maps
        self.blocks = nn.ModuleList(block() for _ in range(d.maps[-1] + 1))
        self.norm = nn.LayerNorm(d.dim, eps) if d.pretrained else nn.Identity()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                zero_bias(module)
        for token in (self.class_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalized, sides multiples of 16 -> maps [B, C, H/16, W/16]."""
        cells = self.patch(images)  # [B, C, h, w]
        shape = (cells.shape[2], cells.shape[3])
        rotation = [part.to(cells.device) for part in self.position(shape)]
        beside = [self.class_token, *([] if self.register_tokens is None else [self.register_tokens])]
        patches = cells.flatten(2).transpose(1, 2)
        tokens = torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in beside), patches], dim=1)
        found = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, shape, *rotation)
            if number in self.maps:
                found.append(self.norm(tokens[:, self.before :]).transpose(1, 2).unflatten(2, shape))
        return found


class SpatialPrior(nn.Module):
    """Detail that patches lack: images to maps at strides 8, 16, 32 by few convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.stem = ConvNorm(3, c, 3, 2, activation="gelu")
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.down = nn.ModuleList(
            [ConvNorm(c, 2 * c, 3, 2), ConvNorm(2 * c, 4 * c, 3, 2), ConvNorm(4 * c, 4 * c, 3, 2)]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> [B, 2c, H/8, W/8], [B, 4c, H/16, W/16], [B, 4c, H/32, W/32]."""
        x = self.pool(self.stem(images))
        levels: list[Tensor] = []
        for down in self.down:
            levels.append(down(F.gelu(levels[-1]) if levels else x))
        return levels


class SpatialTuning(nn.Module):
    """The transformer's maps, resized to strides 8, 16 and 32, each fused with the prior's by a 1x1 convolution.

    channels, strides  of the levels that come out
    """

    ROLES: ClassVar[dict[str, Role]] = {"transformer.patch": "patch_embedding"}

    def __init__(self, transformer: RotaryVit, prior: int, outputs: int, levels: Sequence[int]) -> None:
        """prior  channels of the adapter's stem; levels: of LEVELS, those that come out"""
        super().__init__()
        self.transformer, self.prior = transformer, SpatialPrior(prior)
        dim = transformer.patch.out_channels
        details = [2 * prior, 4 * prior, 4 * prior]
        self.places = [LEVELS.index(level) for level in levels]
        self.fuse = nn.ModuleList(ConvNorm(dim + details[place], outputs) for place in self.places)
        self.channels, self.strides = [outputs] * len(levels), [2**level for level in levels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalized, sides multiples of 32 -> one map [B, C', H/stride, W/stride] per level."""
        fine, middle, coarse = self.transformer(images)
        fine = F.interpolate(fine, scale_factor=2.0, mode="bilinear", align_corners=False)
        coarse = F.avg_pool2d(coarse, 2)  # what bilinear interpolation to half of the size is
        pairs = list(zip((fine, middle, coarse), self.prior(images)))
        return [fuse(torch.cat(pairs[place], dim=1)) for fuse, place in zip(self.fuse, self.places)]

    def layers_above(self, parameter: str) -> int:
        """The exponent of train.layer_decay for one of its parameters, as of every ViT; 0 in the adapter."""
        inside, name = parameter.startswith("transformer."), parameter.removeprefix("transformer.")
        return layers_above(name, len(self.transformer.blocks)) if inside else 0

    def freeze(self, stages: int) -> None:
        """Stop training of the patch embedding (1) and of each quarter of the blocks after it (2 = the first, ...)."""
        freeze_trunk(self.transformer, stages)


def dinov3(
    name: str, levels: Sequence[int], *, width: float = 1.0, frozen_stages: int = 0, layer_scale: float = 0.0
) -> SpatialTuning:
    """A backbone of DEIMv2 by its name in ROTARY_DESIGNS.

    levels  of 3, 4 and 5, which is strides 8, 16 and 32

    Errors: ModelError for another level, and for a width that does not fit the heads.
    """
    design = ROTARY_DESIGNS[name]
    if not set(levels) <= set(LEVELS):
        raise ModelError(
            f"{name} has levels of strides 8, 16 and 32; this model reads strides "
            f"{', '.join(str(2**level) for level in levels)}; use a ResNet, or vit_tiny"
        )
    dim, prior, outputs = (round(channels * width) for channels in (design.dim, design.prior, design.outputs))
    if dim % (4 * design.heads):
        raise ModelError(
            f"{name} of {dim} channels with {design.heads} heads; expected a multiple of {4 * design.heads}, because "
            "positions turn a quarter of each head along an axis; change model.backbone_width"
        )
    scaled = RotaryDesign(**{**vars(design), "dim": dim, "prior": prior, "outputs": outputs})
    net = SpatialTuning(RotaryVit(scaled, layer_scale), prior, outputs, levels)
    net.freeze(frozen_stages)
    return net
