"""Names of tensors in other people's files -> ours: per member, the layouts that are known, told apart by a mark."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models.checkpoints import anchor_names, author_names, detectron_names, transformers_names, vit_names
from edgedetr.models.checkpoints.prefixes import unwrapped
from edgedetr.models.checkpoints.rename_rules import Layout, Weights
from edgedetr.models.checkpoints.resnet_names import rename_backbone

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "detr": (
        Layout("transformers", r"^model\.query_position_embeddings\.", transformers_names.detr),
        Layout("facebookresearch/detr", r"^query_embed\.", author_names.detr),
    ),
    "deformable_detr": (
        Layout("transformers", r"^model\.level_embed$", transformers_names.deformable_detr),
        Layout("fundamentalvision/Deformable-DETR", r"^transformer\.level_embed$", author_names.deformable_detr),
    ),
    "rt_detr": (
        Layout("transformers", r"^model\.enc_score_head\.", transformers_names.rt_detr),
        Layout("lyuwenyu/RT-DETR", r"^decoder\.enc_score_head\.", author_names.rt_detr),
    ),
    "conditional_detr": (
        Layout("transformers", r"^model\.query_position_embeddings\.", anchor_names.hub_conditional),
        Layout(
            "Atten4Vis/ConditionalDETR", r"^transformer\.decoder\.ref_point_head\.", anchor_names.original_conditional
        ),
    ),
    "dn_detr": (
        Layout("transformers (DAB-DETR)", r"^model\.query_refpoint_embeddings\.", anchor_names.hub_dab),
        Layout("IDEA-Research/DAB-DETR, DN-DETR", r"^refpoint_embed\.", anchor_names.original_dab),
    ),
    "anchor_detr": (Layout("megvii-research/AnchorDETR", r"^transformer\.adapt_pos1d\.", anchor_names.anchor),),
    "sparse_rcnn": (Layout("PeizeSun/SparseR-CNN", r"^init_proposal_boxes\.", detectron_names.sparse_rcnn),),
}


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
    layouts = LAYOUTS.get(member, ())
    for layout in layouts:
        if _fits(layout, weights):
            return layout
    known = ", ".join(layout.source for layout in layouts) or "none"
    shown = ", ".join(sorted(weights)[:4])
    others = [name for name, several in LAYOUTS.items() if any(_fits(one, weights) for one in several)]
    advice = f"use --model {' or '.join(others)}" if others else "is --model the member these weights belong to?"
    raise ModelError(
        f"{source}: no known layout of {member} (known: {known}); its {len(weights)} names begin with {shown}; {advice}"
    )


def backbone_of(weights: Mapping[str, Tensor]) -> Weights:
    """The backbone's tensors of a file that holds a backbone alone, or a detector in any layout that is known."""
    weights = _bare(weights)
    whole: Mapping[str, Tensor] = weights
    if not _ours(weights):
        layout = next((one for several in LAYOUTS.values() for one in several if _fits(one, weights)), None)
        if layout is None:
            plain = any(re.search(vit_names.MARK, name) for name in weights)
            return vit_names.rename_vit(weights) if plain else rename_backbone(weights)
        whole = layout.translate(weights)
    return {name.removeprefix("backbone."): tensor for name, tensor in whole.items() if name.startswith("backbone.")}


def _bare(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without what training frameworks put around the names, for any layout or backbone that is known."""

    def known(names: Mapping[str, Tensor]) -> bool:
        return (
            _ours(names)
            or any(_fits(one, names) for several in LAYOUTS.values() for one in several)
            or any(re.match(r"conv1\.|embedder\.|stem\.|cls_token$|patch_embed\.|embeddings\.", name) for name in names)
        )

    return unwrapped(weights, known)


def _ours(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("selector.", "decoder.boxes.")) for name in weights)


def _fits(layout: Layout, weights: Mapping[str, Tensor]) -> bool:
    return any(re.search(layout.mark, name) for name in weights)
