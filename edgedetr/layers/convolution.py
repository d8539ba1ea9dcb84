"""Convolution with its normalization and activation, and the RepVGG block; both fuse to one convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.cpu_kernels.packed import convolve, packs
from edgedetr.layers.norm import FrozenBatchNorm2d, fold_batch_norm
from edgedetr.options import one_of

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "none": nn.Identity,
    "prelu": nn.PReLU,  # one learned slope for all channels, starting at 0.25 (DAB-DETR)
}


class ConvNorm(nn.Module):
    """Convolution without bias -> normalization -> activation; "same" padding."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        activation: str = "none",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
        self.norm = norm(outputs)
        one_of("activation", activation, ACTIVATIONS)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H/stride, W/stride]."""
        if not isinstance(self.norm, FrozenBatchNorm2d):
            return self.activation(self.norm(self.conv(x)))
        if self.packs(x):
            relu = isinstance(self.activation, nn.ReLU)
            x = self.packed(x, relu)
            return x if relu else self.activation(x)
        # A frozen scale goes into the kernel, which is smaller than the map by far.
        conv, (scale, shift) = self.conv, self.norm.affine()
        kernel = conv.weight * scale[:, None, None, None]
        x = F.conv2d(x, kernel, shift, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]  # torch's stubs
        return self.activation(x)

    def packs(self, x: Tensor) -> bool:
        """Whether nothing learns here, so that `convolve` gives the same faster."""
        return isinstance(self.norm, FrozenBatchNorm2d) and packs(x, self.conv)

    def packed(self, x: Tensor, relu: bool, plus: Tensor | None = None) -> Tensor:
        """Where `packs`: convolution and normalization, plus a map where there is one, then ReLU if asked for."""
        return convolve(x, self.conv, self.norm, relu, plus)  # type: ignore[arg-type]  # frozen, as `packs` has seen

    def fused(self) -> nn.Module:
        """The same function in evaluation mode, as convolution with bias -> activation."""
        return nn.Sequential(fold_batch_norm(self.conv, self.norm), self.activation)  # type: ignore[arg-type]


class RepVgg(nn.Module):
    """A 3x3 and a 1x1 branch, summed, then the activation (Ding et al. 2021); one 3x3 convolution when fused."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.wide, self.narrow = ConvNorm(channels, channels, 3), ConvNorm(channels, channels, 1)
        one_of("activation", activation, ACTIVATIONS)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        return self.activation(self.wide(x) + self.narrow(x))

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The same function in evaluation mode: the 1x1 kernel is added to the center of the 3x3 one."""
        wide = fold_batch_norm(self.wide.conv, self.wide.norm)  # type: ignore[arg-type]  # not known to mypy
        narrow = fold_batch_norm(self.narrow.conv, self.narrow.norm)  # type: ignore[arg-type]  # not known to mypy
        wide.weight += F.pad(narrow.weight, (1, 1, 1, 1))
        wide.bias += narrow.bias  # type: ignore[operator]  # not known to mypy
        return nn.Sequential(wide, self.activation)
