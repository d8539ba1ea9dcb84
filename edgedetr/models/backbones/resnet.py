"""ResNet as a backbone: torchvision's (v1.5, stride in the 3x3) and "vd" (deep stem, average-pooled shortcut).

He et al. 2015; He et al. 2018, "Bag of Tricks", figure 2 (C and D); the vd form as RT-DETR builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import ConvNorm
from edgedetr.layers.norm import FrozenBatchNorm2d

# blocks per stage, and whether a block is 1x1-3x3-1x1 with four times the channels at its end
DEPTHS: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
NAMES = (*DEPTHS, *(f"{name}vd" for name in DEPTHS))

Norm = Callable[[int], nn.Module]


class Shortcut(nn.Module):
    """1x1 convolution with stride, or (vd) 2x2 average pooling and a 1x1 convolution that sees every pixel."""

    def __init__(self, inputs: int, outputs: int, stride: int, pooled: bool, norm: Norm) -> None:
        super().__init__()
        pooled = pooled and stride == 2
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if pooled else nn.Identity()
        self.project = ConvNorm(inputs, outputs, 1, 1 if pooled else stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.pool(x))


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or a 1x1-3x3-1x1 bottleneck."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, dilation: int, bottleneck: bool, shortcut: nn.Module, norm: Norm
    ) -> None:
        super().__init__()
        if bottleneck:
            middle = outputs // 4
            self.body = nn.Sequential(
                ConvNorm(inputs, middle, 1, activation="relu", norm=norm),
                ConvNorm(middle, middle, 3, stride, dilation, activation="relu", norm=norm),
                ConvNorm(middle, outputs, 1, norm=norm),
            )
        else:
            self.body = nn.Sequential(
                ConvNorm(inputs, outputs, 3, stride, activation="relu", norm=norm),
                ConvNorm(outputs, outputs, 3, norm=norm),
            )
        self.shortcut = shortcut
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        frozen = [part for part in self.body if isinstance(part, ConvNorm) and part.is_frozen(x)]
        if len(frozen) == len(self.body):
            inner = x
            for part in frozen[:-1]:
                inner = part(inner)
            return frozen[-1].frozen_forward(inner, relu=True, plus=self.shortcut(x))
        # In place: neither a convolution nor a normalization needs its output for its gradient.
        return self.activation(self.body(x).add_(self.shortcut(x)))


class ResNet(nn.Module):
    """Images to feature maps of the stages asked for.

    channels, strides  of those maps, for the modules that read them
    """

    def __init__(
        self,
        depths: Sequence[int],
        bottleneck: bool,
        vd: bool,
        levels: Sequence[int],
        width: float = 1.0,
        norm: Norm = nn.BatchNorm2d,
        dilate_last: bool = False,
    ) -> None:
        """levels  stages to return, 2..5 (C2..C5); dilate_last: C5 at stride 16 with dilated 3x3 (DC5)"""
        super().__init__()
        base = round(64 * width)
        if vd:
            half = base // 2
            self.stem = nn.Sequential(
                ConvNorm(3, half, 3, 2, activation="relu", norm=norm),
                ConvNorm(half, half, 3, activation="relu", norm=norm),
                ConvNorm(half, base, 3, activation="relu", norm=norm),
            )
        else:
            self.stem = nn.Sequential(ConvNorm(3, base, 7, 2, activation="relu", norm=norm))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.levels = tuple(levels)
        self.stages, channels, strides = nn.ModuleList(), base, 4
        self.channels: list[int] = []
        self.strides: list[int] = []
        for number, depth in enumerate(depths):
            outputs = base * 2**number * (4 if bottleneck else 1)
            dilate = dilate_last and number == 3
            stride = 1 if number == 0 or dilate else 2
            blocks: list[nn.Module] = []
            for index in range(depth):
                first = index == 0
                step = stride if first else 1
                # vd basic blocks project the shortcut of every stage's first block, also where nothing changes.
                projected = step != 1 or channels != outputs or (vd and first)
                shortcut = Shortcut(channels, outputs, step, vd, norm) if projected else nn.Identity()
                # The first dilated block still sees the undilated grid (torchvision's replace_stride_with_dilation).
                dilation = 2 if dilate and not first else 1
                blocks.append(Block(channels, outputs, step, dilation, bottleneck, shortcut, norm))
                channels = outputs
            self.stages.append(nn.Sequential(*blocks))
            strides *= stride
            if number + 2 in self.levels:
                self.channels.append(channels)
                self.strides.append(strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalized -> one map [B, C_l, H/stride_l, W/stride_l] per level, finest first."""
        x, maps = self.pool(self.stem(images)), []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number + 2 in self.levels:
                maps.append(x)
        return maps

    def freeze(self, stages: int) -> None:
        """Stop training of the stem (1) and of the stages after it (2 = stem and first stage, ...)."""
        for part in [self.stem, *self.stages][:stages]:
            part.requires_grad_(False)


def resnet(
    name: str,
    levels: Sequence[int],
    *,
    width: float = 1.0,
    frozen_norm: bool = True,
    frozen_stages: int = 0,
    dilate_last: bool = False,
) -> ResNet:
    """A ResNet by its name, "resnet18" .. "resnet101", each also as "...vd"."""
    depths, bottleneck = DEPTHS[name.removesuffix("vd")]
    if dilate_last and not bottleneck:
        raise ModelError(f"model.dilate_last needs a bottleneck ResNet, not {name}; use resnet50 or resnet101")
    net = ResNet(
        depths,
        bottleneck,
        name.endswith("vd"),
        levels,
        width,
        FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d,
        dilate_last,
    )
    net.freeze(frozen_stages)
    return net
