"""HGNetV2 as a backbone: blocks that concatenate the maps of all their layers and mix them with two 1x1 convolutions.

PaddleClas' PP-HGNetV2 as RT-DETR, D-FINE and DEIMv2 build it; RT-DETR's L, X and H are its B4, B5 and B6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import ConvNorm, SeparableConvNorm
from edgedetr.layers.norm import FrozenBatchNorm2d

LIGHT = (2, 3)  # stages whose layers are a 1x1 and a depthwise convolution; the first two have 3x3 convolutions


@dataclass(frozen=True)
class HgNetSize:
    """The numbers in which the sizes differ. Tuples have one number per stage: four, or three in the smallest sizes.

    stem          channels within and after the stem
    middle        channels of the layers of a block
    outputs       channels of the stage's map
    blocks        blocks of the stage
    layers        layers of every block
    affine        a learned scale and bias follow each ReLU (PaddleClas: in the small sizes alone)
    light_kernel  side of the depthwise convolutions
    """

    stem: tuple[int, int]
    middle: tuple[int, ...]
    outputs: tuple[int, ...]
    blocks: tuple[int, ...]
    layers: int
    affine: bool = False
    light_kernel: int = 5


# Sources: PaddleClas' pp_hgnet_v2.py (b0 to b6) and DEIMv2's engine/backbone/hgnetv2.py (atto, femto, pico).
SIZES: dict[str, HgNetSize] = {
    "hgnetv2_atto": HgNetSize((16, 16), (16, 32, 64), (64, 256, 256), (1, 1, 1), 3, affine=True, light_kernel=3),
    "hgnetv2_femto": HgNetSize((16, 16), (16, 32, 64), (64, 256, 512), (1, 1, 1), 3, affine=True),
    "hgnetv2_pico": HgNetSize((16, 16), (16, 32, 64), (64, 256, 512), (1, 1, 2), 3, affine=True),
    "hgnetv2_b0": HgNetSize((16, 16), (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, affine=True),
    "hgnetv2_b1": HgNetSize((24, 32), (32, 48, 96, 192), (64, 256, 512, 1024), (1, 1, 2, 1), 3, affine=True),
    "hgnetv2_b2": HgNetSize((24, 32), (32, 64, 128, 256), (96, 384, 768, 1536), (1, 1, 3, 1), 4, affine=True),
    "hgnetv2_b3": HgNetSize((24, 32), (32, 64, 128, 256), (128, 512, 1024, 2048), (1, 1, 3, 1), 5, affine=True),
    "hgnetv2_b4": HgNetSize((32, 48), (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1), 6),
    "hgnetv2_b5": HgNetSize((32, 64), (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2), 6),
    "hgnetv2_b6": HgNetSize((48, 96), (96, 192, 384, 768), (192, 512, 1024, 2048), (2, 3, 6, 3), 6),
}
NAMES = tuple(SIZES)

Norm = Callable[[int], nn.Module]


class HgStem(nn.Module):
    """Stride 4: a 3x3 convolution, two 2x2 convolutions beside a 2x2 maximum, a 3x3 and a 1x1 convolution."""

    def __init__(self, inside: int, outputs: int, activation: str, norm: Norm) -> None:
        super().__init__()
        self.stem1 = ConvNorm(3, inside, 3, 2, activation=activation, norm=norm)
        self.stem2a = ConvNorm(inside, inside // 2, 2, activation=activation, norm=norm)
        self.stem2b = ConvNorm(inside // 2, inside, 2, activation=activation, norm=norm)
        self.stem3 = ConvNorm(2 * inside, inside, 3, 2, activation=activation, norm=norm)
        self.stem4 = ConvNorm(inside, outputs, activation=activation, norm=norm)
        self.pool = nn.MaxPool2d(2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> [B, C, H/4, W/4]."""
        x = _pad(self.stem1(images))
        return self.stem4(self.stem3(torch.cat([self.pool(x), self.stem2b(_pad(self.stem2a(x)))], dim=1)))


class HgBlock(nn.Module):
    """Layers in a row; the input and the map of every layer are concatenated and mixed; plus the input, if residual."""

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        layers: int,
        light_kernel: int,
        residual: bool,
        activation: str,
        norm: Norm,
    ) -> None:
        """light_kernel  side of the depthwise convolutions; 0: the layers are 3x3 convolutions"""
        super().__init__()
        widths = [inputs, *[middle] * (layers - 1)]
        self.layers = nn.ModuleList(
            SeparableConvNorm(width, middle, light_kernel, activation=activation, norm=norm)
            if light_kernel
            else ConvNorm(width, middle, 3, activation=activation, norm=norm)
            for width in widths
        )
        self.aggregate = nn.Sequential(
            ConvNorm(inputs + layers * middle, outputs // 2, activation=activation, norm=norm),
            ConvNorm(outputs // 2, outputs, activation=activation, norm=norm),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        mixed = self.aggregate(torch.cat(maps, dim=1))
        return mixed + x if self.residual else mixed


class HgStage(nn.Module):
    """A depthwise convolution with stride 2 (not in the first stage), then blocks of which all but one are residual."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class HgNetV2(nn.Module):
    """Images to feature maps of the stages asked for.

    channels, strides  of those maps, for the modules that read them
    """

    def __init__(self, size: HgNetSize, levels: Sequence[int], width: float = 1.0, norm: Norm = nn.BatchNorm2d) -> None:
        """levels  stages to return, 2..5 (C2..C5); width: factor of every channel count"""
        super().__init__()
        activation = "affine_relu" if size.affine else "relu"
        inside, channels = (scaled(number, width) for number in size.stem)
        self.stem = HgStem(inside, channels, activation, norm)
        self.levels = tuple(levels)
        self.stages = nn.ModuleList()
        self.channels: list[int] = []
        self.strides: list[int] = []
        for number, depth in enumerate(size.blocks):
            middle, outputs = scaled(size.middle[number], width), scaled(size.outputs[number], width)
            kernel = size.light_kernel if number in LIGHT else 0
            first = number == 0
            downsample = nn.Identity() if first else ConvNorm(channels, channels, 3, 2, norm=norm, groups=channels)
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(HgBlock(channels, middle, outputs, size.layers, kernel, index > 0, activation, norm))
                channels = outputs
            self.stages.append(HgStage(downsample, blocks))
            if number + 2 in self.levels:
                self.channels.append(channels)
                self.strides.append(4 * 2**number)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # as RT-DETR's first weights

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalized -> one map [B, C_l, H/stride_l, W/stride_l] per level, finest first."""
        x, maps = self.stem(images), []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number + 2 in self.levels:
                maps.append(x)
        return maps

    def freeze(self, stages: int) -> None:
        """Stop training of the stem (1) and of the stages after it (2 = stem and first stage, ...)."""
        for part in [self.stem, *self.stages][:stages]:
            part.requires_grad_(False)


def _pad(x: Tensor) -> Tensor:
    """A row of zeros below and a column at the right, so that a 2x2 kernel keeps the size."""
    return F.pad(x, (0, 1, 0, 1))


def scaled(channels: int, width: float) -> int:
    """A channel count times `width`, even, because blocks halve it; at least 2."""
    return channels if width == 1 else max(2 * round(channels * width / 2), 2)


def hgnetv2(
    name: str, levels: Sequence[int], *, width: float = 1.0, frozen_norm: bool = True, frozen_stages: int = 0
) -> HgNetV2:
    """An HGNetV2 by its name, "hgnetv2_atto" .. "hgnetv2_b6"."""
    size = SIZES[name]
    there = len(size.blocks) + 1
    if max(levels) > there:
        enough = [other for other, item in SIZES.items() if len(item.blocks) + 1 >= max(levels)]
        raise ModelError(
            f"model.backbone is {name}, whose last map is C{there} (stride {2**there}), and this model reads "
            f"C{max(levels)}; expected one of {', '.join(enough)}"
        )
    net = HgNetV2(size, levels, width, FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d)
    net.freeze(frozen_stages)
    return net
