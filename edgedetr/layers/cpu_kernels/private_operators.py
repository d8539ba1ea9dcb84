"""Every private operator of PyTorch that we call, in one file, each compared with the public operators before use.

They are oneDNN's fused operators, which torch.compile writes into its graphs: a product or a convolution with bias, sum
and ReLU in one pass. A release of PyTorch may drop or change them, so `supports` runs each once per process and type on
small tensors, next to the public operators. Where one is missing or differs, a log line says so, and callers use the
public operators: the result is the same up to rounding, only slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

Stamp = tuple[int, int]


def supports(operator: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether an operator works here with a type: it exists, the CPU supports the type, and it computes correctly.

    operator  "linear" or "convolution"
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return _checked(operator, dtype)


def linear(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """a [N, K], b [M, K], bias [M] -> a b^T + bias [N, M], then ReLU if asked for; no gradients."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "relu" if relu else "none", [], "")
    return y


def convolution(
    x: Tensor, kernel: Tensor, bias: Tensor, conv: nn.Conv2d, relu: bool, plus: Tensor | None = None
) -> Tensor:
    """The convolution of `conv` with another kernel and bias, plus a map, then ReLU if asked for; no gradients.

    x [B, C, H, W], kernel of `reordered_kernel` or [C', C, h, w], bias [C'], plus [B, C', H', W'] -> [B, C', H', W']
    """
    last, geometry = "relu" if relu else "none", (conv.padding, conv.stride, conv.dilation, conv.groups)
    fused = torch.ops.mkldnn._convolution_pointwise
    y: Tensor
    if plus is None:
        y = fused(x, kernel, bias, *geometry, last, [], "")
    else:
        y = fused.binary(x, plus, kernel, bias, *geometry, "add", 1.0, last, [], "")
    return y


def reordered_kernel(kernel: Tensor, conv: nn.Conv2d, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A kernel [C', C, h, w] in oneDNN's memory order for inputs of `size` [B, C, H, W]."""
    reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    geometry = [list(part) for part in (conv.padding, conv.stride, conv.dilation)]
    return reorder(kernel.to_mkldnn(dtype), *geometry, conv.groups, list(size))


def relu_gradient_(gradient: Tensor, output: Tensor) -> Tensor:
    """The gradient of ReLU's input, written over `gradient`; `output` is ReLU's."""
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)
    return gradient


def stamp(tensor: Tensor) -> Stamp:
    """Changes whenever a tensor is replaced or written to: its address, and how often it was written."""
    return tensor.data_ptr(), tensor._version


@lru_cache
def _checked(operator: str, dtype: torch.dtype) -> bool:
    """`supports`, computed once per process."""
    check = {"linear": _linear_is_right, "convolution": _convolution_is_right}[operator]
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            right = check(dtype)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        log.warning(
            "PyTorch %s has no fused %s that we know (%s): training is slower", torch.__version__, operator, error
        )
        return False
    if not right:
        log.warning("PyTorch %s computes its fused %s differently: it is not used", torch.__version__, operator)
    return right


def _ramp(*shape: int) -> Tensor:
    """Numbers in -1..1 of any shape, without touching torch's random state."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count, dtype=torch.float32) * 0.7371).sin().view(shape)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    # Sums of at most 72 products of numbers up to 1: float32 rounds them by less than 1e-5, bfloat16 by 8 bits.
    return torch.allclose(a.float(), b.float(), atol=1e-4 if dtype == torch.float32 else 0.1)


def _linear_is_right(dtype: torch.dtype) -> bool:
    a, b, bias = (_ramp(*shape).to(dtype) for shape in ((5, 16), (8, 16), (8,)))
    expected = F.linear(a, b, bias)
    return _close(linear(a, b, bias), expected, dtype) and _close(linear(a, b, bias, relu=True), expected.relu(), dtype)


def _convolution_is_right(dtype: torch.dtype) -> bool:
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False, device="meta")
    x, weight, bias, plus = (_ramp(*shape) for shape in ((2, 8, 6, 6), (8, 8, 3, 3), (8,), (2, 8, 3, 3)))
    kernel = reordered_kernel(weight, conv, x.shape, dtype)
    x, weight, bias, plus = (tensor.to(dtype) for tensor in (x, weight, bias, plus))
    expected = F.conv2d(x, weight, bias, 2, 1)
    return (
        _close(convolution(x, kernel, bias, conv, relu=False), expected, dtype)
        and _close(convolution(x, kernel, bias, conv, relu=True), expected.relu(), dtype)
        and _close(convolution(x, kernel, bias, conv, True, plus.clone()), (expected + plus).relu(), dtype)
    )
