"""Convert the tensor names of checkpoints of other libraries to ours, by the layouts that a member declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY
from edgedetr.models.checkpoints.backbone_names import VIT_MARK, rename_backbone, rename_vit
from edgedetr.models.checkpoints.rename_rules import Layout, Weights

# Tensors of losses and of torch's averaged models, which a trained model does not use.
NOT_THE_MODEL = re.compile(
    r"^(?:(?:\w+\.)?(?:criterion|loss|loss_fn|matcher|metrics?|val_metrics?)\.|n_averaged$|updates$)"
)
# Prefixes added by DistributedDataParallel, torch.compile, Lightning modules and averaged models.
PREFIX = re.compile(r"^(?:module|model|net|network|detector|_orig_mod|ema|ema_model|model_ema)\.")


def translate(member: str, weights: Mapping[str, Tensor], source: str = "the file") -> Weights:
    """A file's tensors under our names of a member; those that have our names already are unchanged.

    Errors: ModelError, which shows some names, if no layout of the member fits.
    """
    weights = _without_prefixes(weights)
    if _has_our_names(weights):
        return dict(weights)
    return _find_layout(member, weights, source).translate(weights)


def layout_of(member: str, weights: Mapping[str, Tensor], source: str = "the file") -> str:
    """Whose names a file uses: "edgedetr", or the source of a layout. Errors: as in `translate`."""
    weights = _without_prefixes(weights)
    return "edgedetr" if _has_our_names(weights) else _find_layout(member, weights, source).source


def _find_layout(member: str, weights: Mapping[str, Tensor], source: str) -> Layout:
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
    """The backbone's tensors of a file that holds only a backbone, or a detector in any known layout."""
    weights = _without_prefixes(weights)
    whole: Mapping[str, Tensor] = weights
    if not _has_our_names(weights):
        layout = next((one for one in _all_layouts() if one.fits(weights)), None)
        if layout is None:
            plain = any(re.search(VIT_MARK, name) for name in weights)
            return rename_vit(weights) if plain else rename_backbone(weights)
        whole = layout.translate(weights)
    return {name.removeprefix("backbone."): tensor for name, tensor in whole.items() if name.startswith("backbone.")}


def _without_prefixes(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without the prefixes of training frameworks, for any known layout or backbone."""

    def known(names: Mapping[str, Tensor]) -> bool:
        return (
            _has_our_names(names)
            or any(one.fits(names) for one in _all_layouts())
            or any(re.match(r"conv1\.|embedder\.|stem\.|cls_token$|patch_embed\.|embeddings\.", name) for name in names)
        )

    return unwrapped(weights, known)


def _has_our_names(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("selector.", "decoder.boxes.")) for name in weights)


def _all_layouts() -> list[Layout]:
    return [layout for member in FAMILY.values() for layout in member.layouts]


def unwrapped(weights: Mapping[str, Tensor], known: Callable[[Mapping[str, Tensor]], bool]) -> Mapping[str, Tensor]:
    """The tensors without prefixes, as soon as `known` accepts the names; unchanged if it never does.

    A prefix is removed only if every name has it: `model.` is a part of transformers' own names.
    """
    inside: Mapping[str, Tensor] = {name: tensor for name, tensor in weights.items() if not NOT_THE_MODEL.match(name)}
    for _ in range(4):
        if known(inside):
            return inside
        found = PREFIX.match(next(iter(inside), ""))
        if not found or not all(name.startswith(found[0]) for name in inside):
            break
        inside = {name.removeprefix(found[0]): tensor for name, tensor in inside.items()}
    return weights
