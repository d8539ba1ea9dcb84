"""Tensor names of LW-DETR and RF-DETR: their authors' and transformers', which writes RF-DETR as its authors do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models.checkpoints.author_names import LAYER, SELF_FIRST
from edgedetr.models.checkpoints.backbone_names import rename_projector, rename_vit
from edgedetr.models.checkpoints.rename_rules import RenameRule, Weights, rename, split_packed
from edgedetr.models.checkpoints.transformers_names import PARTS

HEADS: list[RenameRule] = [
    (r"^class_embed\.", "decoder.boxes.score."),
    (r"^bbox_embed\.", "decoder.boxes.box."),
    (r"^(?:model|transformer)\.decoder\.ref_point_head\.", "selector.place."),
]
AUTHORS: list[RenameRule] = [*HEADS, (r"^transformer\.decoder\.", "decoder."), *LAYER, *SELF_FIRST]
TRANSFORMERS: list[RenameRule] = [
    *HEADS,
    (r"^(model\.decoder\..*)\.cross_attn_layer_norm\.", r"\1.encoder_attn_layer_norm."),
    (r"^(model\.decoder\..*)\.cross_attn\.", r"\1.encoder_attn."),
    (r"^(model\.decoder\.layers\.\d+)\.layer_norm\.", r"\1.final_layer_norm."),
    *PARTS,
]
QUERY_GROUP = re.compile(
    r"^(?:model|transformer)\.(enc_output|enc_output_norm|enc_out_class_embed|enc_out_bbox_embed)\.(\d+)\."
)
GROUP_PARTS = {
    "enc_output": "project",
    "enc_output_norm": "norm",
    "enc_out_class_embed": "score",
    "enc_out_bbox_embed": "box",
}
# One table each for all groups, group after group.
GROUP_TABLES: dict[str, str] = {
    r"^(?:model\.)?query_feat\.weight$": "content",
    r"^(?:refpoint_embed|model\.reference_point_embed)\.weight$": "offset",
}


def split_query_groups(weights: Mapping[str, Tensor]) -> Weights:
    """Heads `enc_output.G` and so on, and tables for all groups, as our selector and its `others`.

    Errors: ModelError for tables that the number of groups does not divide.
    """
    groups = len({found[2] for name in weights if (found := QUERY_GROUP.match(name))}) or 1

    def owner(group: int) -> str:
        return f"selector.others.{group - 1}." if group else "selector."

    split: Weights = {}
    for name, tensor in weights.items():
        table = next((ours for pattern, ours in GROUP_TABLES.items() if re.match(pattern, name)), None)
        if table is None:
            found = QUERY_GROUP.match(name)
            new = f"{owner(int(found[2]))}{GROUP_PARTS[found[1]]}.{name[found.end() :]}" if found else name
            split[new] = tensor
            continue
        if len(tensor) % groups:
            raise ModelError(
                f"{name} has {len(tensor)} rows for {groups} groups of queries; expected equally many in each"
            )
        for group, rows in enumerate(tensor.chunk(groups)):
            split[f"{owner(group)}{table}.weight"] = rows.clone()
    return split


def _parts(weights: Mapping[str, Tensor], trunk: str, projector: str) -> Weights:
    """Backbone, projector and query groups under our names; the rest as it is.

    trunk, projector   prefixes of their names
    """
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith((trunk, projector))}
    found = split_query_groups(rest)
    for theirs, ours, change in ((trunk, "backbone.", rename_vit), (projector, "encoder.project.", rename_projector)):
        part = {name.removeprefix(theirs): tensor for name, tensor in weights.items() if name.startswith(theirs)}
        found |= {ours + name: tensor for name, tensor in change(part).items()}
    return found


def transformers(weights: Mapping[str, Tensor]) -> Weights:
    """LW-DETR as files and in memory, RF-DETR in memory."""
    return rename(_parts(weights, "model.backbone.backbone.", "model.backbone.projector."), TRANSFORMERS)


def lw_detr(weights: Mapping[str, Tensor]) -> Weights:
    """Atten4Vis/LW-DETR."""
    return split_packed(rename(_parts(weights, "backbone.0.encoder.", "backbone.0.projector."), AUTHORS))


def rf_detr(weights: Mapping[str, Tensor]) -> Weights:
    """roboflow/rf-detr, and transformers' files of it. Errors: ModelError for a model that predicts masks."""
    if any(name.startswith("segmentation_head.") for name in weights):
        raise ModelError(
            "these weights predict masks (segmentation_head); expected an RF-DETR that predicts boxes alone"
        )
    return split_packed(rename(_parts(weights, "backbone.0.encoder.encoder.", "backbone.0.projector."), AUTHORS))
