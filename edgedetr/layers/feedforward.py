"""The position-wise feed-forward of a transformer layer, and the small MLP of the heads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgedetr.layers.convolution import ACTIVATIONS
from edgedetr.layers.cpu_kernels import private_operators
from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype, is_eager
from edgedetr.layers.linear import Linear, gradients, rows_of
from edgedetr.options import one_of

SMALL = 1 << 18  # with fewer hidden values, saving a pass over them is not worth the call

BETWEEN = {"relu": F.relu, "silu": F.silu}  # the Linears of an Mlp


class FeedForward(nn.Module):
    """Linear(C, hidden) -> activation -> Linear(hidden, C), with dropout after each."""

    def __init__(
        self, dim: int, hidden: int, activation: str = "relu", dropout: float = 0.0, activation_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.up, self.down = Linear(dim, hidden), Linear(hidden, dim)
        one_of("activation", activation, ACTIVATIONS)
        self.activation = ACTIVATIONS[activation]()
        if isinstance(self.activation, (nn.ReLU, nn.SiLU)):
            # A Linear returns a view for [B, N, C], and the gradient of an in-place change copies all of it.
            self.activation.inplace = False
        self.dropout, self.activation_dropout = nn.Dropout(dropout), nn.Dropout(activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        if self._fuses(x):
            kind = autocast_dtype(x) or torch.float32
            tensors = (x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
            y: Tensor = _FeedForward.apply(*(tensor.to(kind) for tensor in tensors))
            return self.dropout(y)
        return self.dropout(self.down(self.activation_dropout(self.activation(self.up(x)))))

    def _fuses(self, x: Tensor) -> bool:
        """Whether the fused form applies: plain Linears that learn, ReLU, on a CPU, and large enough."""
        plain = type(self.up) is Linear and type(self.down) is Linear and isinstance(self.activation, nn.ReLU)
        kind = autocast_dtype(x) or torch.float32
        return (
            plain
            and torch.is_grad_enabled()
            and is_eager(x)
            and x.dtype in (torch.float32, kind)
            and self.up.weight.dtype == torch.float32
            and x.numel() // x.shape[-1] * len(self.up.weight) >= SMALL
            and not (self.activation_dropout.training and self.activation_dropout.p)
            and private_operators.supports("linear", kind)
        )


class GatedFeedForward(nn.Module):
    """Linear(hidden, C) of SiLU(gate) * up, both Linear(C, hidden) (SwiGLU; Shazeer 2020, "GLU Variants", eq. 6)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Linear(dim, hidden), Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mlp(nn.Module):
    """`layers` Linears with ReLU, or SiLU, between them."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, layers: int, limit: float | None = None, activation: str = "relu"
    ) -> None:
        """limit  of the outputs' magnitude, or None"""
        super().__init__()
        one_of("activation", activation, tuple(BETWEEN))
        self.limit, self.activate = limit, BETWEEN[activation]
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == 0 else layer(self.activate(x))
        return x if self.limit is None else x.clamp(-self.limit, self.limit)


class _FeedForward(torch.autograd.Function):
    """down(relu(up(x))): ReLU in one pass with its product, its gradient in place; x [..., C], weights and biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        hidden = private_operators.linear(rows_of(x), up, up_bias, relu=True)  # [N, hidden]
        ctx.save_for_backward(x, hidden, up, down)
        return private_operators.linear(hidden, down, down_bias).view(*x.shape[:-1], len(down))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, up, down = ctx.saved_tensors
        needs, gradient = ctx.needs_input_grad, rows_of(gradient)
        of_hidden, of_down, of_down_bias = gradients(gradient, hidden, down, (any(needs[:3]), needs[3], needs[4]))
        of_x = of_up = of_up_bias = None
        if of_hidden is not None:
            private_operators.relu_gradient_(of_hidden, hidden)
            of_x, of_up, of_up_bias = gradients(of_hidden, rows_of(x), up, needs)
        return of_x if of_x is None else of_x.view(x.shape), of_up, of_up_bias, of_down, of_down_bias
