"""A Linear that uses oneDNN for its products while it learns, on CPUs where MKL is slow; the same up to rounding.

torch's own Linear calls MKL, which runs AMD's processors with kernels of half their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgedetr.layers.cpu_kernels import private_operators
from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype, is_eager_fp32
from edgedetr.runtime.cpu import mkl_is_narrow

SMALL = 1 << 21  # with fewer multiplications the call from Python costs more than the product saves


class Linear(nn.Linear):
    """x [..., in] -> [..., out]; torch's Linear in all but speed."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] or None -> x weight^T + bias, [..., out]."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product: it is large, in float32, on such a CPU, and needs gradients."""
    return (
        mkl_is_narrow()
        and torch.is_grad_enabled()
        and is_eager_fp32(x)
        and is_eager_fp32(weight)
        and x.numel() * len(weight) >= SMALL
        and autocast_dtype(x) is None
        and private_operators.supports("linear")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return private_operators.linear(rows_of(x), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, *of_parameters = gradients(rows_of(gradient), rows_of(x), weight, ctx.needs_input_grad)
        return of_x if of_x is None else of_x.view(x.shape), *of_parameters


def gradients(gradient: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of x [N, in], weight [out, in] and bias [out] of a Linear; `gradient` [N, out] is its output's."""
    of_x = of_weight = None
    if needed[0]:
        of_x = product(gradient, weight.t())
    if needed[1]:
        # The wider side as rows of the second factor: by oneDNN up to 1.7 times as fast as the other way round.
        of_weight = product(x.t(), gradient.t()).t() if len(weight) > x.shape[1] else product(gradient.t(), x.t())
    return [of_x, of_weight, gradient.sum(0) if needed[2] else None]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K], b [M, K] -> a b^T [N, M], by the faster library; without gradients."""
    return private_operators.linear(a, b) if mkl_is_narrow() and a.dtype == torch.float32 else a @ b.t()


def rows_of(x: Tensor) -> Tensor:
    """x [..., C] -> [N, C]."""
    return x.reshape(-1, x.shape[-1])
