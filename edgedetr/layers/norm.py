"""Normalizations: frozen BatchNorm, its folding into the convolution before it, LayerNorm of cells, RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d with fixed statistics and fixed scale: for pretrained backbones and small batches.

    The four tensors are buffers under BatchNorm2d's names, so either kind loads the other's weights.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale [C] and shift [C]: the normalization is x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        scale, shift = self.affine()
        return x * scale[:, None, None] + shift[:, None, None]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every cell of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RmsNorm(nn.Module):
    """Division by the root mean square of the channels, and a factor per channel (Zhang and Sennrich 2019, eq. 4).

    Written out, because torch's own has no form in ONNX before opset 23.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape; the mean is computed in float32 or better."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class Normalize(nn.Module):
    """Pixels 0..255 to what the backbone was trained on: (x / 255 - mean) / std, per RGB channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.shifted = any(mean)
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        # Not in the state dict: they belong to the configuration, not to the weights.
        self.register_buffer("scale", scale.float()[:, None, None], persistent=False)
        self.register_buffer("shift", shift.float()[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], 0..255 -> normalized, the same shape."""
        scaled = images * self.scale
        return scaled + self.shift if self.shifted else scaled


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """One convolution with bias that equals `norm(conv(x))` in evaluation mode.

    norm  a BatchNorm2d or FrozenBatchNorm2d with running statistics
    """
    if not isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
        raise TypeError(f"a batch normalization can be folded, {type(norm).__name__} cannot")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    # In float64: the fold is done once, and its rounding would stay in the exported weights.
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        pair(conv.kernel_size),
        pair(conv.stride),
        padding_of(conv),
        pair(conv.dilation),
        conv.groups,
        bias=False,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    folded.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    shift = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    folded.bias = nn.Parameter(shift.to(conv.weight.dtype))
    return folded.requires_grad_(False)


@torch.no_grad()
def unfold_batch_norm(conv: nn.Conv2d, norm: nn.Module, folded: nn.Conv2d) -> None:
    """The inverse of `fold_batch_norm`: give conv and norm values whose fold is exactly `folded`.

    The normalization becomes an addition of the bias: mean 0, scale 1, and a variance that is 1 with its epsilon. In
    float64 its square root differs from 1 by less than half a step of a float32, so no bit of the weights changes.
    """
    if not isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)) or norm.running_mean is None or folded.bias is None:
        raise TypeError(f"only a batch normalization with statistics can be unfolded, not {type(norm).__name__}")
    if norm.running_var is None or conv.bias is not None:
        raise TypeError("only a convolution without bias before a batch normalization with statistics can be unfolded")
    conv.weight.copy_(folded.weight)
    norm.weight.fill_(1)
    norm.bias.copy_(folded.bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


def pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Kernel, stride or dilation of a Conv2d: (height, width)."""
    height, width = sizes
    return height, width


def padding_of(conv: nn.Conv2d) -> str | tuple[int, int]:
    """The padding of a Conv2d: (height, width), or a word such as "same"."""
    return conv.padding if isinstance(conv.padding, str) else pair(conv.padding)
