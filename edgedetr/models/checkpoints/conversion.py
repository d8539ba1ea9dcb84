"""Names of tensors in other people's files -> ours: per member, the layouts that are known, told apart by a mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY
from edgedetr.models.checkpoints.backbone_names import VIT_MARK, rename_backbone, rename_vit
from edgedetr.models.checkpoints.rename_rules import Layout, Weights

# Of the loss, and of torch's averaged models: nothing that a trained model computes with.
BESIDE = re.compile(r"^(?:(?:\w+\.)?(?:criterion|loss|loss_fn|matcher|metrics?|val_metrics?)\.|n_averaged$|updates$)")
# DistributedDataParallel, torch.compile, Lightning modules, averaged models: the names of the field inside.
PREFIX = re.compile(r"^(?:module|model|net|network|detector|_orig_mod|ema|ema_model|model_ema)\.")


def translate(member: str, weights: Mapping[str, Tensor], source: str = "the file") -> Weights:
    """A file's tensors under the names of a member; what is ours already passes as it is.

    Errors: ModelError where no layout of the member fits, which shows some names.
    """
    weights = _bare(weights)
    if _ours(weights):
        return dict(weights)
    return _layout(member, weights, source).translate(weights)


def layout_of(member: str, weights: Mapping[str, Tensor], source: str = "the file") -> str:
    """Whose names a file uses: "edgedetr" or the source of a layout; ModelError as in `translate`."""
    weights = _bare(weights)
    return "edgedetr" if _ours(weights) else _layout(member, weights, source).source


def _layout(member: str, weights: Mapping[str, Tensor], source: str) -> Layout:
    layouts = FAMILY[member].layouts
    for layout in layouts:
        if layout.fits(weights):
            return layout
    known = ", ".join(layout.source for layout in layouts) or "none"
    shown = ", ".join(sorted(weights)[:4])
    others = [other.name for other in FAMILY.values() if any(one.fits(weights) for one in other.layouts)]
    advice = f"use --model {' or '.join(others)}" if others else "is --model the member these weights belong to?"
    raise ModelError(
        f"{source}: no known layout of {member} (known: {known}); its {len(weights)} names begin with {shown}; {advice}"
    )


def backbone_of(weights: Mapping[str, Tensor]) -> Weights:
    """The backbone's tensors of a file that holds a backbone alone, or a detector in any layout that is known."""
    weights = _bare(weights)
    whole: Mapping[str, Tensor] = weights
    if not _ours(weights):
        layout = next((one for one in _all_layouts() if one.fits(weights)), None)
        if layout is None:
            plain = any(re.search(VIT_MARK, name) for name in weights)
            return rename_vit(weights) if plain else rename_backbone(weights)
        whole = layout.translate(weights)
    return {name.removeprefix("backbone."): tensor for name, tensor in whole.items() if name.startswith("backbone.")}


def _bare(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without what training frameworks put around the names, for any layout or backbone that is known."""

    def known(names: Mapping[str, Tensor]) -> bool:
        return (
            _ours(names)
            or any(one.fits(names) for one in _all_layouts())
            or any(re.match(r"conv1\.|embedder\.|stem\.|cls_token$|patch_embed\.|embeddings\.", name) for name in names)
        )

    return unwrapped(weights, known)


def _ours(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("selector.", "decoder.boxes.")) for name in weights)


def _all_layouts() -> list[Layout]:
    return [layout for member in FAMILY.values() for layout in member.layouts]


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
