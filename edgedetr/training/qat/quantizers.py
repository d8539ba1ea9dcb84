"""Fake quantizers of tensors and weights, and the layers that use them: the arithmetic of Q/DQ pairs, with gradients.

Rounding and clipping are nvidia-modelopt's TensorQuantizer, on values that were divided by their scale as
QuantizeLinear divides them. Its straight-through gradient then gives that of the scale as well: what rounding adds to a
value inside the range, the limit outside (Esser et al. 2020, "Learned Step Size Quantization", eq. 3).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import TrainingError
from edgedetr.layers.linear import linear
from edgedetr.layers.norm import padding_of, pair
from edgedetr.packages import install, missing
from edgedetr.quantization.target import MIN_SCALE

LIMIT = 127  # of the signed grid


def require_modelopt() -> Any:
    """modelopt.torch.quantization. Errors: TrainingError where nvidia-modelopt is not installed."""
    noisy = logging.getLogger("modelopt")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # it warns of libraries that it does not need here
    try:
        import modelopt.torch.quantization as found
    except ImportError as error:
        raise TrainingError(
            f"quantization-aware training needs NVIDIA's modelopt ({missing('modelopt', error)}); "
            f"run: {install(['modelopt', 'requests'])}"
        ) from error
    finally:
        noisy.setLevel(level)
    return found


def _rounding() -> nn.Module:
    """modelopt's quantizer on the grid -128..127 with step 1: it rounds half to even and clips, straight through."""
    modelopt = require_modelopt()
    form = modelopt.config.QuantizerAttributeConfig(num_bits=8, axis=None, narrow_range=False, pass_through_bwd=False)
    rounding: nn.Module = modelopt.nn.TensorQuantizer(form)
    rounding.amax = torch.tensor(float(LIMIT))
    return rounding


def _rounded(rounding: nn.Module, x: Tensor) -> Tensor:
    """x on the grid; maps with channels last stay so, where the quantizer alone would copy them."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        swapped: Tensor = rounding(x.permute(0, 2, 3, 1))
        return swapped.permute(0, 3, 1, 2)
    plain: Tensor = rounding(x)
    return plain


class TensorRange(nn.Module):
    """The quantizer of one activation: per tensor, symmetric, signed; every layer that reads the tensor shares it.

    tensor      its name in the graph
    start       the largest magnitude that INT8 represents, as it was given; 0: the tensor is always 0
    log_growth  [] natural logarithm of what the range has grown by since: a step of the optimizer changes every range
                by the same factor, whatever its size
    shares      the range of the tensor before a MaxPool, which is this one's as well (see share_pool_ranges), or None
    """

    def __init__(self, tensor: str, amax: float, *, learned: bool, shares: TensorRange | None = None) -> None:
        super().__init__()
        self.tensor, self.start, self.enabled = tensor, amax, True
        self.log_growth = nn.Parameter(torch.zeros(()), requires_grad=learned and amax > 0 and shares is None)
        self.rounding = _rounding()
        self._shares = () if shares is None else (shares,)  # in a tuple: it is owned elsewhere

    @property
    def amax(self) -> float:
        """The largest magnitude that INT8 represents now."""
        for other in self._shares:
            return other.amax
        return self.start * float(self.log_growth.detach().double().exp())

    @torch.no_grad()
    def exact_scale(self) -> Tensor:
        """[] float64, `quantization.target.scale_of` of the range."""
        for other in self._shares:
            return other.exact_scale()
        growth = self.log_growth.double().exp()
        return (self.start * growth / LIMIT).clamp(min=MIN_SCALE) if self.start > 0 else torch.ones_like(growth)

    def scale(self) -> Tensor:
        """[] the distance of two neighboring levels, as the graph has it."""
        for other in self._shares:
            return other.scale()
        exact = self.exact_scale().to(self.log_growth.dtype)
        if not self.log_growth.requires_grad:
            return exact
        return _WithGradientOf.apply(exact, self.log_growth.exp() * (self.start / LIMIT))

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the nearest levels, in x's type."""
        if not self.enabled:
            return x
        scale = self.scale()
        if scale.requires_grad:
            # LSQ, section 2.2: as many values pull at a range, so its gradient is scaled to the size of a weight's.
            scale = _ScaledGradient.apply(scale, (max(x.numel(), 1) * LIMIT) ** -0.5)
        return (_rounded(self.rounding, x.float() / scale) * scale).to(x.dtype)


class _WithGradientOf(torch.autograd.Function):
    """The first value with the gradient of the second, which is the same up to rounding."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, smooth: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _ScaledGradient(torch.autograd.Function):
    """x unchanged; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


@dataclass(frozen=True)
class InputPart:
    """Some input channels of a layer, which come from one tensor.

    channels   how many; 0 = all
    ranges     the tensor's quantizer for each call of the layer in a forward pass, in order; None: this call is float,
               as the graph computes it from constants or does not need it. The last one serves all further calls
    has_bias   whether the graph adds the layer's bias in the node that reads this part
    """

    channels: int
    ranges: tuple[TensorRange | None, ...]
    has_bias: bool


class LayerQuantizer:
    """How a layer's inputs and weight are quantized; no nn.Module, because tensors are shared between layers.

    parts   more than one where a 1x1 convolution reads a Concat, whose branches have their own ranges and scales
    calls   of the layer since the forward pass began
    """

    def __init__(self, parts: Sequence[InputPart]) -> None:
        self.parts, self.calls, self.enabled = tuple(parts), 0, True
        self.rounding = _rounding()

    def __call__(self, x: Tensor, axis: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x with its channels along `axis`, and weight [out, in, ...], both on their levels."""
        call, self.calls = self.calls, self.calls + 1
        ranges = [part.ranges[min(call, len(part.ranges) - 1)] for part in self.parts]
        widths = [part.channels or weight.shape[1] for part in self.parts]
        inputs = x.split(widths, axis) if len(widths) > 1 else (x,)
        weights = weight.split(widths, 1) if len(widths) > 1 else (weight,)
        found = [
            (piece, kernel) if one is None else (one(piece), self._weight(kernel, bias if part.has_bias else None, one))
            for part, one, piece, kernel in zip(self.parts, ranges, inputs, weights)
        ]
        if len(found) == 1:
            return found[0]
        return torch.cat([piece for piece, _ in found], axis), torch.cat([kernel for _, kernel in found], 1)

    def _weight(self, weight: Tensor, bias: Tensor | None, data: TensorRange) -> Tensor:
        """weight [out, ...] on its levels, with one scale per output channel."""
        if not self.enabled:
            return weight
        scale = weight_scale(weight, bias, data.exact_scale()).view(-1, *[1] * (weight.dim() - 1))
        return _rounded(self.rounding, weight / scale) * scale


@torch.no_grad()
def weight_scale(weight: Tensor, bias: Tensor | None, data_scale: Tensor) -> Tensor:
    """[out] the scales that `quantized_weight.quantize_weight` gives to a weight [out, ...].

    data_scale   [] float64, of the input
    """
    scale = (weight.detach().flatten(1).abs().amax(1).double() / LIMIT).clamp(min=MIN_SCALE)
    if bias is not None:
        scale = torch.maximum(scale, bias.detach().double().abs() / (data_scale / 2 * 2**30))
    return scale.to(weight.dtype)


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose inputs and weight are on the levels of its INT8 form."""

    def __init__(self, conv: nn.Conv2d, quantizer: LayerQuantizer) -> None:
        sizes = pair(conv.kernel_size), pair(conv.stride), padding_of(conv), pair(conv.dilation)
        super().__init__(conv.in_channels, conv.out_channels, *sizes, conv.groups, device="meta")
        self.weight, self.bias, self.quantizer = conv.weight, conv.bias, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H', W']."""
        x, weight = self.quantizer(x, 1, self.weight, self.bias)
        return self._conv_forward(x, weight, self.bias)


class QuantizedLinear(nn.Linear):
    """A Linear whose input and weight are on the levels of its INT8 form."""

    def __init__(self, base: nn.Linear, quantizer: LayerQuantizer) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.quantizer = base.weight, base.bias, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        x, weight = self.quantizer(x, -1, self.weight, self.bias)
        return linear(x, weight, self.bias)


class QuantizedPool(nn.MaxPool2d):
    """A MaxPool on integers: input and output share one range, so the output is on its levels as well."""

    def __init__(self, pool: nn.MaxPool2d, quantizer: TensorRange) -> None:
        super().__init__(
            pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode
        )
        self.quantizers = (quantizer,)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(
            self.quantizers[0](x), self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
