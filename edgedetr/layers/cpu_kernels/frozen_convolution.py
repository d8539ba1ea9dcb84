"""Convolutions without gradients on a CPU: normalization, sum and ReLU in one pass with the convolution.

The frozen normalization is folded into the kernel, which is stored in oneDNN's memory order once, not in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgedetr.layers.cpu_kernels import private_operators
from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype, is_eager
from edgedetr.layers.norm import FrozenBatchNorm2d


class FoldedKernel:
    """The kernel of one convolution with its normalization folded in, computed again when a weight changes.

    It belongs to a layer but is no part of the model: a copy of the layer starts with an empty one, and nothing of it
    is saved or moved.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[private_operators.Stamp, ...], torch.dtype, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: object) -> FoldedKernel:
        return FoldedKernel()

    def __reduce__(self) -> tuple[type[FoldedKernel], tuple[()]]:
        return FoldedKernel, ()

    def of(
        self,
        conv: nn.Conv2d,
        norm: FrozenBatchNorm2d,
        size: Sequence[int],
        dtype: torch.dtype,
        factor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Kernel in oneDNN's order for inputs of `size` [B, C, H, W], and shift [C'], both times `factor` [1]."""
        parts = [conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        parts += [] if factor is None else [factor]
        stamps = tuple(private_operators.stamp(part) for part in parts)
        known = self._known
        if known is None or known[:2] != (stamps, dtype):
            with torch.no_grad():
                scale, shift = norm.affine()
                if factor is not None:
                    scale, shift = scale * factor, shift * factor
                folded = conv.weight * scale[:, None, None, None]
                kernel = private_operators.reordered_kernel(folded, conv, size, dtype)
            known = self._known = stamps, dtype, kernel, shift.to(dtype)
        return known[2], known[3]


def applies(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `convolve` may replace a convolution that has a frozen normalization: no gradients, eager on a CPU."""
    dtype = autocast_dtype(x)
    return (
        not conv.weight.requires_grad
        and not x.requires_grad
        and conv.weight.dtype == torch.float32
        and x.dtype in (torch.float32, dtype)
        and is_eager(x)
        and is_eager(conv.weight)
        and not conv.weight.is_inference()
        and private_operators.supports("convolution", dtype or torch.float32)
    )


def convolve(
    x: Tensor,
    conv: nn.Conv2d,
    norm: FrozenBatchNorm2d,
    folded: FoldedKernel,
    relu: bool,
    plus: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """norm(conv(x)) times a factor [1], plus a map, if given, then ReLU if asked for; without gradients.

    x [B, C, H, W], plus [B, C', H', W'] -> [B, C', H', W'], in autocast's type where that is on
    """
    dtype = autocast_dtype(x) or torch.float32
    kernel, shift = folded.of(conv, norm, x.shape, dtype, factor)
    return private_operators.convolution(x.to(dtype), kernel, shift, conv, relu, plus)
