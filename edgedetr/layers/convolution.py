"""Convolution with its normalization and activation, and the RepVGG block; both fuse to one convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.cpu_kernels.frozen_convolution import FoldedKernel, applies, convolve
from edgedetr.layers.norm import FrozenBatchNorm2d, fold_batch_norm, padding_of, pair, unfold_batch_norm
from edgedetr.options import one_of


class AffineRelu(nn.Module):
    """scale * ReLU(x) + bias, with one learned number each for all channels (PP-HGNetV2's learnable affine block)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) + self.bias

    def is_frozen(self) -> bool:
        """Whether the scale can be a part of the layer before: it is positive, and nothing here learns."""
        return not (self.scale.requires_grad or self.bias.requires_grad) and float(self.scale) > 0


class ReluPlus(nn.Module):
    """ReLU(x) + bias: what is left of an AffineRelu whose scale is part of the convolution before it."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.bias


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "none": nn.Identity,
    "prelu": nn.PReLU,  # one learned slope for all channels, starting at 0.25 (DAB-DETR)
    "affine_relu": AffineRelu,
}


class ConvNorm(nn.Module):
    """Convolution without bias -> normalization -> activation; "same" padding if the kernel is odd, none if it is 2."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        activation: str = "none",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding = dilation * ((kernel - 1) // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = norm(outputs)
        one_of("activation", activation, ACTIVATIONS)
        self.activation = ACTIVATIONS[activation]()
        self._folded = FoldedKernel()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H/stride, W/stride]."""
        if not isinstance(self.norm, FrozenBatchNorm2d):
            return self.activation(self.norm(self.conv(x)))
        if self.is_frozen(x):
            activation = self.activation
            if isinstance(activation, AffineRelu) and activation.is_frozen():
                # s ReLU(x) = ReLU(s x) for s > 0, so that only an addition is left.
                return self.frozen_forward(x, relu=True, factor=activation.scale).add_(activation.bias)
            relu = isinstance(activation, nn.ReLU)
            x = self.frozen_forward(x, relu)
            return x if relu else activation(x)
        # A frozen scale is multiplied into the kernel, which is much smaller than the map.
        conv, (scale, shift) = self.conv, self.norm.affine()
        kernel = conv.weight * scale[:, None, None, None]
        x = F.conv2d(x, kernel, shift, pair(conv.stride), padding_of(conv), pair(conv.dilation), conv.groups)
        return self.activation(x)

    def is_frozen(self, x: Tensor) -> bool:
        """Whether no gradient is needed here, so that `frozen_forward` computes the same faster."""
        return isinstance(self.norm, FrozenBatchNorm2d) and applies(x, self.conv)

    def frozen_forward(self, x: Tensor, relu: bool, plus: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """If `is_frozen`: convolution and normalization, times a factor, plus a map, if given; ReLU if asked for."""
        if not isinstance(self.norm, FrozenBatchNorm2d):
            raise TypeError(f"a frozen normalization is needed here, not {type(self.norm).__name__}")
        return convolve(x, self.conv, self.norm, self._folded, relu, plus, factor)

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The same function in evaluation mode, as convolution with bias -> activation.

        A norm that depends on the input (LayerNorm) cannot be folded: the module itself.
        """
        if isinstance(self.norm, nn.LayerNorm):
            return self
        conv, activation = fold_batch_norm(self.conv, self.norm), self.activation
        if isinstance(activation, AffineRelu) and float(activation.scale) > 0:
            # s ReLU(x) = ReLU(s x) for s > 0, so that only an addition is left after the convolution.
            scale = activation.scale.double()
            for tensor in conv.parameters():
                tensor.copy_(tensor.double() * scale)
            activation = ReluPlus(activation.bias)
        return nn.Sequential(conv, activation)

    @torch.no_grad()
    def load_fused(self, fused: nn.Module) -> None:
        """The inverse of `fused`: take the function of a convolution with bias -> activation."""
        if isinstance(self.norm, nn.LayerNorm):
            self.load_state_dict(fused.state_dict())
            return
        conv, activation = fused.get_submodule("0"), fused.get_submodule("1")
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"a fused ConvNorm begins with a convolution, not with {type(conv).__name__}")
        unfold_batch_norm(self.conv, self.norm, conv)
        if isinstance(self.activation, AffineRelu) and isinstance(activation, ReluPlus):
            self.activation.scale.fill_(1)
            self.activation.bias.copy_(activation.bias)
        else:
            self.activation.load_state_dict(activation.state_dict())


class SeparableConvNorm(nn.Module):
    """A 1x1 convolution without activation, then a depthwise one (HGNetV2's light layers, D-FINE's downsampling)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        activation: str = "none",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.point = ConvNorm(inputs, outputs, norm=norm)
        self.depth = ConvNorm(outputs, outputs, kernel, stride, activation=activation, norm=norm, groups=outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H/stride, W/stride]."""
        return self.depth(self.point(x))


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
        wide = fold_batch_norm(self.wide.conv, self.wide.norm)
        narrow = fold_batch_norm(self.narrow.conv, self.narrow.norm)
        wide.weight += F.pad(narrow.weight, (1, 1, 1, 1))
        if wide.bias is not None and narrow.bias is not None:  # fold_batch_norm gives both
            wide.bias += narrow.bias
        return nn.Sequential(wide, self.activation)

    @torch.no_grad()
    def load_fused(self, fused: nn.Module) -> None:
        """The inverse of `fused`: the 3x3 branch takes all, the 1x1 branch gives 0."""
        conv = fused.get_submodule("0")
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"a fused RepVgg begins with a convolution, not with {type(conv).__name__}")
        unfold_batch_norm(self.wide.conv, self.wide.norm, conv)
        narrow = fold_batch_norm(self.narrow.conv, self.narrow.norm)
        for tensor in narrow.parameters():
            tensor.zero_()
        unfold_batch_norm(self.narrow.conv, self.narrow.norm, narrow)
        self.activation.load_state_dict(fused.get_submodule("1").state_dict())
