"""When a layer may take a faster way on a CPU, and in which type numbers are multiplied there."""

from __future__ import annotations

import torch
from torch import Tensor


def quick(tensor: Tensor) -> bool:
    """Whether a float32 tensor is computed with here and now: on a CPU, and not for a graph."""
    return tensor.dtype == torch.float32 and eager(tensor)


def eager(tensor: Tensor) -> bool:
    """Whether a tensor is on a CPU, and operators run as they are called instead of going into a graph."""
    return tensor.device.type == "cpu" and not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def mixed(tensor: Tensor) -> torch.dtype | None:
    """The half precision that autocast multiplies in, for tensors on a CPU; None without autocast."""
    on = tensor.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if on else None


def onednn(operator: str, kind: torch.dtype = torch.float32) -> bool:
    """Whether torch has an operator of oneDNN by this name, and it takes this type on this processor."""
    # The operators are those that torch.compile puts into its graphs; not every build of torch has them.
    if not (
        torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, operator)
    ):
        return False
    return kind == torch.float32 or (kind == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
