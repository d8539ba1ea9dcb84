"""What training frameworks put around a state dict's names: prefixes that all share, and parts that are no network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

# Of the loss, and of torch's averaged models: nothing that a trained model computes with.
BESIDE = re.compile(r"^(?:(?:\w+\.)?(?:criterion|loss|loss_fn|matcher|metrics?|val_metrics?)\.|n_averaged$|updates$)")
# DistributedDataParallel, torch.compile, Lightning modules, averaged models: the names of the field inside.
PREFIX = re.compile(r"^(?:module|model|net|network|detector|_orig_mod|ema|ema_model|model_ema)\.")


def unwrapped(weights: Mapping[str, Tensor], known: Callable[[Mapping[str, Tensor]], bool]) -> Mapping[str, Tensor]:
    """The tensors without prefixes, as soon as `known` says yes to the names; as they are where it never does.

    A prefix goes only where every name has it: `model.` is a part of transformers' own names.
    """
    inside: Mapping[str, Tensor] = {name: tensor for name, tensor in weights.items() if not BESIDE.match(name)}
    for _ in range(4):
        if known(inside):
            return inside
        found = PREFIX.match(next(iter(inside), ""))
        if not found or not all(name.startswith(found[0]) for name in inside):
            break
        inside = {name.removeprefix(found[0]): tensor for name, tensor in inside.items()}
    return weights
