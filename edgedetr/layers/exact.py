"""Float32 amid autocast, for heads: their numbers are ranks and coordinates, of which half precision keeps 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def exactly(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), in float32 where autocast would multiply in half precision."""
    if not torch.is_autocast_enabled(x.device.type):
        return module(x)  # type: ignore[no-any-return]  # torch's stubs
    with torch.autocast(x.device.type, enabled=False):
        return module(x.float())  # type: ignore[no-any-return]  # torch's stubs
