"""Sums whose operands are quantized: a sum is no module, so it is counted within the forward pass of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgedetr.training.qat.quantizers import TensorRange


class QuantizedSums:
    """The forward of a module in which operands of some sums are quantized.

    operands   {(which sum of the call, which operand): quantizer}; sums of two activations are counted, those of the
               modules inside as well
    seen       where the operands of every sum are noted, or None
    """

    def __init__(
        self,
        module: nn.Module,
        operands: Mapping[tuple[int, int], TensorRange],
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.module, self.operands, self.seen = module, dict(operands), seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Sums(self.operands, self.seen):
            return type(self.module).forward(self.module, *args, **kwargs)


class _Sums(TorchFunctionMode):
    """Replaces operands of sums, or notes them in `seen` where it is a list."""

    OPERATORS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)

    def __init__(
        self, operands: Mapping[tuple[int, int], TensorRange], seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.operands, self.seen, self.count = operands, seen, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self.OPERATORS and len(args) >= 2 and all(_is_activation(one) for one in args[:2]):
            if self.seen is not None:
                self.seen.append((args[0].detach().clone(), args[1].detach().clone()))
            pair = [
                self.operands[self.count, i](x) if (self.count, i) in self.operands else x
                for i, x in enumerate(args[:2])
            ]
            args = (*pair, *args[2:])
            self.count += 1
        return func(*args, **(kwargs or {}))


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point()
