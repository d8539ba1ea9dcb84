"""Heads compute in float32 under autocast: their outputs are ranks and coordinates, of which bfloat16 keeps 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), in float32 also where autocast would compute in half precision."""
    kind = x.device.type  # the "meta" device, on which models are only counted, has no autocast
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        y: Tensor = module(x)
        return y
    with torch.autocast(kind, enabled=False):
        y = module(x.float())
        return y
