"""Names of Sparse R-CNN in its authors' .pth files, which are detectron2's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.rename_rules import Rule, Weights, rename, split_packed

SPARSE_RCNN: list[Rule] = [
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.stem.0.norm."),
    (r"^backbone\.bottom_up\.stem\.conv1\.", "backbone.stem.0.conv."),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.", lambda m: f"backbone.stages.{int(m[1]) - 2}.{m[2]}."),
    (r"^(backbone\.stages\..*)\.conv([123])\.norm\.", lambda m: f"{m[1]}.body.{int(m[2]) - 1}.norm."),
    (r"^(backbone\.stages\..*)\.conv([123])\.", lambda m: f"{m[1]}.body.{int(m[2]) - 1}.conv."),
    (r"^(backbone\.stages\..*)\.shortcut\.norm\.", r"\1.shortcut.project.norm."),
    (r"^(backbone\.stages\..*)\.shortcut\.(?=weight)", r"\1.shortcut.project.conv."),
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"encoder.pyramid.lateral.{int(m[1]) - 2}."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"encoder.pyramid.smooth.{int(m[1]) - 2}."),
    (r"^init_proposal_features\.", "selector.content."),
    (r"^init_proposal_boxes\.", "selector.box."),
    (r"^head\.head_series\.(\d+)\.cls_module\.", r"decoder.boxes.class_tower.\1."),
    (r"^head\.head_series\.(\d+)\.reg_module\.", r"decoder.boxes.box_tower.\1."),
    (r"^head\.head_series\.(\d+)\.class_logits\.", r"decoder.boxes.score.\1."),
    (r"^head\.head_series\.(\d+)\.bboxes_delta\.", r"decoder.boxes.box.\1."),
    (r"^head\.head_series\.", "decoder.layers."),
    (r"\.inst_interact\.dynamic_layer\.", ".cross_attention.interaction.weights."),
    (r"\.inst_interact\.norm([12])\.", lambda m: f".cross_attention.interaction.norms.{int(m[1]) - 1}."),
    (r"\.inst_interact\.out_layer\.", ".cross_attention.interaction.out."),
    (r"\.inst_interact\.norm3\.", ".cross_attention.interaction.out_norm."),
    (r"\.self_attn\.out_proj\.", ".self_attention.out."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.linear1\.", ".feedforward.up."),
    (r"\.linear2\.", ".feedforward.down."),
    (r"^(decoder\.layers\.\d+)\.norm1\.", r"\1.self_norm."),
    (r"^(decoder\.layers\.\d+)\.norm2\.", r"\1.cross_norm."),
    (r"^(decoder\.layers\.\d+)\.norm3\.", r"\1.feedforward_norm."),
]


def sparse_rcnn(weights: Mapping[str, Tensor]) -> Weights:
    return rename(split_packed(weights), SPARSE_RCNN)
