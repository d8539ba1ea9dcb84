"""Low-rank adaptation: a frozen Linear learns a low-rank correction, which is merged into it before export.

Hu et al. 2021, "LoRA", section 4.1: W + (alpha / r) B A, with B = 0 at first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.linear import linear


class LoraLinear(nn.Linear):
    """A Linear with frozen weight and bias, plus a trainable product of rank r.

    down [r, in], up [out, r]
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.factor = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias) + linear(linear(x, self.down), self.up) * self.factor

    @torch.no_grad()
    def fused(self) -> nn.Linear:
        """One Linear of the same function."""
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        plain.weight.copy_(self.weight + self.factor * (self.up @ self.down))
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain


def adapt(root: nn.Module, patterns: Sequence[str], rank: int, alpha: float, but: Sequence[str] = ()) -> list[str]:
    """Replace every Linear whose dotted name matches one of `patterns` by a LoraLinear; -> their names.

    but   patterns of names that are not replaced
    """
    names = [
        name
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear)
        and any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in but)
    ]
    if not names and but:
        raise ModelError(
            f"train.lora_on {list(patterns)} matches no Linear that starts from trained weights; expected "
            "train.start, or patterns of a pretrained backbone"
        )
    if not names:
        raise ModelError(
            f"train.lora_on {list(patterns)} matches no Linear of this model; expected patterns of names "
            f"like {_some_linear(root)}"
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        base = root.get_submodule(name)
        if isinstance(base, nn.Linear):
            setattr(root.get_submodule(parent), child, LoraLinear(base, rank, alpha))
    return names


def merged(root: nn.Module) -> nn.Module:
    """A copy in which every LoraLinear is merged into a plain Linear."""
    result = copy.deepcopy(root)
    for name, module in list(result.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, child = name.rpartition(".")
            setattr(result.get_submodule(parent), child, module.fused())
    return result


def _some_linear(root: nn.Module) -> str:
    return next((name for name, module in root.named_modules() if isinstance(module, nn.Linear)), "(it has none)")
