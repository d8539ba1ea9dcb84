"""Convolutions that do not learn, on a CPU: normalization, sum and ReLU in one pass with the convolution.

The kernel takes up the normalization and gets the order in memory that oneDNN wants once, not in every step.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from edgedetr.layers.cpu_kernels.cpu_features import eager, mixed, onednn
from edgedetr.layers.norm import FrozenBatchNorm2d

Stamp = tuple[tuple[int, int], ...]  # where each tensor lies, and how often it has been written to

# Beside the modules, not in them: nothing of it is copied, moved or saved with a model.
_packed: WeakKeyDictionary[nn.Conv2d, tuple[Stamp, Tensor, Tensor]] = WeakKeyDictionary()


def packs(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `convolve` may take the place of a convolution that has a frozen normalization: nothing learns here."""
    kind = mixed(x)
    return (
        not conv.weight.requires_grad
        and not x.requires_grad
        and conv.weight.dtype == torch.float32
        and x.dtype in (torch.float32, kind)
        and eager(x)
        and eager(conv.weight)
        and not conv.weight.is_inference()
        and onednn("_convolution_pointwise", kind or torch.float32)
    )


def convolve(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d, relu: bool, plus: Tensor | None = None) -> Tensor:
    """norm(conv(x)), plus a map where there is one, then ReLU if asked for; without gradients.

    x [B, C, H, W], plus [B, C', H', W'] -> [B, C', H', W'], in autocast's type where that is on
    """
    kind = mixed(x) or torch.float32
    kernel, shift = _folded(conv, norm, list(x.shape), kind)
    x = x.to(kind)
    last, place = "relu" if relu else "none", (conv.padding, conv.stride, conv.dilation, conv.groups)
    one_pass = torch.ops.mkldnn._convolution_pointwise
    if plus is None:
        return one_pass(x, kernel, shift, *place, last, [], "")  # type: ignore[no-any-return]  # an operator by name
    return one_pass.binary(x, plus, kernel, shift, *place, "add", 1.0, last, [], "")  # type: ignore[no-any-return]


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d, size: list[int], kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kernel in oneDNN's order and shift [C'], made anew when a weight has changed; size of the images to come."""
    parts = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    stamp = tuple((part.data_ptr(), part._version) for part in parts)
    known = _packed.get(conv)
    if known is None or known[0] != stamp or known[2].dtype != kind:
        with torch.no_grad():
            scale, shift = norm.affine()
            kernel = (conv.weight * scale[:, None, None, None]).to_mkldnn(kind)
            kernel = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]  # torch's stubs lack the last
                kernel, list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups, size
            )
        known = _packed[conv] = stamp, kernel, shift.to(kind)
    return known[1], known[2]
