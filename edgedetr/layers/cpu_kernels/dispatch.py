"""When a layer may use a CPU kernel instead of PyTorch's public operators."""

from __future__ import annotations

import torch
from torch import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Whether a tensor is on a CPU and operators run eagerly: no tracing, no torch.compile."""
    return tensor.device.type == "cpu" and not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def is_eager_fp32(tensor: Tensor) -> bool:
    """`is_eager`, and the tensor is float32."""
    return tensor.dtype == torch.float32 and is_eager(tensor)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The half-precision type of autocast for a tensor on a CPU; None without autocast."""
    on = tensor.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if on else None
