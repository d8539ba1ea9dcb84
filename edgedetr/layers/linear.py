"""A Linear whose products are made by oneDNN while it learns on a CPU that MKL underuses; the same up to rounding.

torch's own Linear calls MKL, which gives AMD's processors kernels of half their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgedetr.layers.rows import quick
from edgedetr.runtime.cpu import mkl_is_narrow

SMALL = 1 << 21         # multiplications under which calling from Python costs more than the product saves


class Linear(nn.Linear):
    """x [..., in] -> [..., out]; torch's Linear in all but speed."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] or None -> x weight^T + bias, [..., out]."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]  # torch's stubs


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN makes this product: large, in float32, on such a CPU, and with gradients to come."""
    return (mkl_is_narrow() and torch.is_grad_enabled() and quick(x) and quick(weight)
            and x.numel() * len(weight) >= SMALL and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])                     # [N, out]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = product(gradient, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])                                      # [N, in]
            # The wider side as rows of the second factor: up to 1.7 times as fast as the other way round.
            of_weight = product(x.t(), gradient.t()).t() if len(weight) > x.shape[1] else product(gradient.t(), x.t())
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, of_bias


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [N, K], b [M, K], bias [M] -> a b^T + bias, [N, M]; by oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")  # type: ignore[no-any-return]  # by name
