"""Float32 amid autocast, for heads: their numbers are ranks and coordinates, of which half precision keeps 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def exactly(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), in float32 where autocast would multiply in half precision."""
    kind = x.device.type  # on "meta", where models are only counted, there is no autocast to ask for
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return module(x)  # type: ignore[no-any-return]  # torch's stubs
    with torch.autocast(kind, enabled=False):
        return module(x.float())  # type: ignore[no-any-return]  # torch's stubs
