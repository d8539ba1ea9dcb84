"""Run a two-stage member with a given selection of its best cells, so that two runs can be compared query for query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OtherSelections(ValueError):
    """A run has another number of selections than the one that it is compared with."""


class Selection(TorchFunctionMode):
    """While it is entered, torch.topk takes given elements; without given ones, those that it took at the first time.

    A member without a selection is not affected. Errors: OtherSelections, where it is left or topk is called.

    chosen   the indices for each call, in order
    gap      largest difference of a value that was taken by a given index from the one that topk would have taken there
    """

    def __init__(self, chosen: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.gap = 0.0
        self._given, self._recording = chosen is not None, chosen is None
        self._chosen: list[Tensor] = list(chosen or ())
        self._next = 0

    def __enter__(self) -> Selection:
        self._next = 0
        super().__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        recorded, self._recording = self._recording, False
        super().__exit__(kind, value, traceback)
        if kind is None and not recorded and self._next < len(self._chosen):
            raise OtherSelections(f"{self._next} selections; expected {len(self._chosen)}, as many as were given")

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        if self._recording:
            found = func(*args, **kwargs)
            self._chosen.append(found.indices)
            return found
        if self._next == len(self._chosen):
            raise OtherSelections(f"more than {len(self._chosen)} selections; expected as many as were given")
        indices, self._next = self._chosen[self._next], self._next + 1
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        values = args[0].gather(dim, indices)
        if self._given:
            difference = float((func(*args, **kwargs).values - values).abs().max())
            self.gap = float(np.maximum(self.gap, difference))  # a NaN stays, which max would lose
        return torch.return_types.topk((values, indices))
