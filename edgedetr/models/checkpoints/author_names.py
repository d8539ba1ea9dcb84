"""Tensor names in the checkpoints that the authors of each paper published.

facebookresearch/detr, Deformable-DETR, RT-DETR versions 1 and 2, D-FINE, DEIMv2, Conditional DETR, DAB-DETR, DN-DETR,
DINO, Anchor DETR, Sparse R-CNN (detectron2's names).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgedetr.models.checkpoints.backbone_names import rename_backbone
from edgedetr.models.checkpoints.hybrid_names import D_FINE_AUTHORS, DEIMV2_AUTHORS, HYBRID, split_pairs
from edgedetr.models.checkpoints.rename_rules import (
    RenameRule,
    Weights,
    apply_to_prefix,
    one_box_head,
    rename,
    split_packed,
    untie_heads,
)

# Names of a layer in torch.nn.Transformer, which all authors keep; the order of the decoder's norms differs.
LAYER: list[RenameRule] = [
    (r"\.linear1\.", ".feedforward.up."),
    (r"\.linear2\.", ".feedforward.down."),
    (r"\.out_proj\.", ".out."),
    (r"^(decoder\..*)\.self_attn\.", r"\1.self_attention."),
    (r"\.self_attn\.", ".attention."),
    (r"\.(?:multihead_attn|cross_attn)\.", ".cross_attention."),
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".weights."),
    (r"\.value_proj\.", ".value."),
    (r"\.output_proj\.", ".out."),
    (r"^(encoder\..*)\.norm1\.", r"\1.attention_norm."),
    (r"^(encoder\..*)\.norm2\.", r"\1.feedforward_norm."),
    (r"^(decoder\..*)\.norm3\.", r"\1.feedforward_norm."),
]
SELF_FIRST: list[RenameRule] = [
    (r"^(decoder\..*)\.norm1\.", r"\1.self_norm."),
    (r"^(decoder\..*)\.norm2\.", r"\1.cross_norm."),
]
CROSS_FIRST: list[RenameRule] = [
    (r"^(decoder\..*)\.norm1\.", r"\1.cross_norm."),
    (r"^(decoder\..*)\.norm2\.", r"\1.self_norm."),
]

DETR: list[RenameRule] = [
    (r"^backbone\.1\.row_embed\.", "encoder.position.row."),
    (r"^backbone\.1\.col_embed\.", "encoder.position.column."),
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.", ""),
    (r"^input_proj\.", "encoder.project."),
    (r"^query_embed\.", "selector.position."),
    (r"^class_embed\.", "decoder.boxes.score."),
    (r"^bbox_embed\.", "decoder.boxes.box."),
]
DEFORMABLE: list[RenameRule] = [
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.", ""),
    (r"^input_proj\.", "encoder.project."),
    (r"^level_embed$", "encoder.place.level"),
    (r"^query_embed\.", "selector.embed."),
    (r"^reference_points\.", "selector.reference."),
    (r"^enc_output\.", "selector.project."),
    (r"^enc_output_norm\.", "selector.norm."),
    (r"^pos_trans\.", "selector.place."),
    (r"^pos_trans_norm\.", "selector.place_norm."),
]
DINO: list[RenameRule] = [
    (r"^(?:transformer\.decoder\.)?class_embed\.\d+\.", "decoder.boxes.score."),
    (r"^(?:transformer\.decoder\.)?bbox_embed\.\d+\.", "decoder.boxes.box."),
    (r"^transformer\.enc_out_class_embed\.", "selector.score."),
    (r"^transformer\.enc_out_bbox_embed\.", "selector.box."),
    (r"^transformer\.tgt_embed\.", "selector.content."),
    (r"^transformer\.decoder\.ref_point_head\.", "decoder.query_position.head."),
    (r"^label_enc\.", "selector.denoising_class_embed."),
    *DEFORMABLE,
]
# RT-DETR and D-FINE, beside the parts of the hybrid encoder.
SELECTING: list[RenameRule] = [
    (
        r"^(encoder|decoder)\.input_proj\.(\d)\.(?:0|conv)\.",
        lambda m: f"encoder.{'project' if m[1] == 'encoder' else 'memory_project'}.{m[2]}.conv.",
    ),
    (
        r"^(encoder|decoder)\.input_proj\.(\d)\.(?:1|norm)\.",
        lambda m: f"encoder.{'project' if m[1] == 'encoder' else 'memory_project'}.{m[2]}.norm.",
    ),
    (r"^encoder\.encoder\.0\.layers\.", "encoder.attention."),
    (r"^decoder\.decoder\.layers\.", "decoder.layers."),
    (r"^decoder\.enc_output\.(?:0|proj)\.", "selector.project."),
    (r"^decoder\.enc_output\.(?:1|norm)\.", "selector.norm."),
    (r"^decoder\.enc_score_head\.", "selector.score."),
    (r"^decoder\.enc_bbox_head\.", "selector.box."),
    (r"^decoder\.dec_score_head\.", "decoder.boxes.score."),
    (r"^decoder\.dec_bbox_head\.", "decoder.boxes.box."),
    (r"^decoder\.query_pos_head\.", "decoder.query_position."),
    (r"^decoder\.denoising_class_embed\.", "selector.denoising_class_embed."),
    (r"^decoder\.tgt_embed\.", "selector.content."),
]
D_FINE: list[RenameRule] = [
    (r"^decoder\.pre_bbox_head\.", "decoder.boxes.first."),
    (r"^decoder\.decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.boxes.quality.\1.confidence."),
    (r"^decoder\.(?:decoder\.)?reg_scale$", "decoder.boxes.bins.scale"),
    (r"^decoder\.(?:decoder\.)?up$", "decoder.boxes.bins.up"),
    (r"\.gateway\.gate\.", ".gate.weights."),
    (r"\.gateway\.norm\.", ".gate.norm."),
]
DEIMV2: list[RenameRule] = [
    (r"\.swish_ffn\.w12\.", ".feedforward.gated."),
    (r"\.swish_ffn\.w3\.", ".feedforward.down."),
    *D_FINE,
]
RMS_SCALES: list[RenameRule] = [(r"(_norm|\.gate\.norm)\.scale$", r"\1.weight")]
LITE: list[RenameRule] = [(r"^encoder\.project\.0\.", "encoder.project.")]  # one projection, not a list of them
# sa_qcontent_proj, sa_kpos_proj, ca_v_proj, ca_qpos_sine_proj of the authors -> q, k_position, v, q_spatial.
CONDITIONAL_PROJECTIONS: list[RenameRule] = [
    (r"\.sa_", ".self_attention."),
    (r"\.ca_", ".cross_attention."),
    (r"\.([qkv])(?:content)?_proj\.", r".\1."),
    (r"\.qpos_sine_proj\.", ".q_spatial."),
    (r"\.([qk])pos_proj\.", r".\1_position."),
]
# Parts of the decoder outside of its layers; `model.` on the hub, `transformer.` in the authors' files.
CONDITIONAL_DECODER: list[RenameRule] = [
    (r"^(?:model|transformer)\.encoder\.query_scale\.", "encoder.position_scale."),
    (r"^(?:model|transformer)\.decoder\.query_scale\.", "decoder.spatial.scale."),
    (r"^(?:model|transformer)\.decoder\.ref_anchor_head\.", "decoder.spatial.size."),
]
REFERENCE_POINT: list[RenameRule] = [
    (r"^(?:model|transformer)\.decoder\.ref_point_head\.", "selector.point.head."),
    *CONDITIONAL_DECODER,
]
REFERENCE_BOX: list[RenameRule] = [
    (r"^(?:model|transformer)\.decoder\.ref_point_head\.", "decoder.query_position.head."),
    *CONDITIONAL_DECODER,
]
CONDITIONAL_HEADS: list[RenameRule] = [
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^class_embed\.", "decoder.boxes.score."),
    (r"^(?:transformer\.decoder\.)?bbox_embed\.", "decoder.boxes.box."),
    (r"^input_proj\.", "encoder.project."),
    (r"^query_embed\.", "selector.position."),
    (r"^refpoint_embed\.", "selector.box."),
    (r"^label_enc\.", "selector.denoising_class_embed."),
    (r"\.activation\.weight$", ".feedforward.activation.weight"),
    (r"^transformer\.", ""),
]
ANCHOR: list[RenameRule] = [
    (r"^backbone\.body\.", "backbone."),
    (r"^input_proj\.0\.", "encoder.project."),
    (r"^transformer\.pattern\.", "selector.pattern."),
    (r"^transformer\.position\.weight$", "selector.points.points"),
    (r"^transformer\.adapt_pos1d\.", "encoder.position.adapt."),
    (r"^transformer\.adapt_pos2d\.", "selector.points.adapt."),
    (r"\.adapt\.(\d)\.", lambda m: f".adapt.layers.{int(m[1]) // 2}."),  # Linear 0, ReLU 1, Linear 2
    (r"^transformer\.(en|de)coder_layers\.", r"\1coder.layers."),
    (r"^transformer\.class_embed\.\d+\.", "decoder.boxes.score."),
    (r"^transformer\.bbox_embed\.\d+\.", "decoder.boxes.box."),
    (r"\.ffn\.norm2\.", ".feedforward_norm."),
    (r"\.ffn\.linear", ".linear"),
    # The first norm of a decoder layer follows the cross-attention, though self-attention runs first.
    (r"^(decoder\..*)\.norm1\.", r"\1.cross_norm."),
    (r"^(decoder\..*)\.norm2\.", r"\1.self_norm."),
]
ROW_COLUMN = ("q_x", "q_y", "k_x", "k_y", "v")  # row-column attention's packed projection; "row" there is along x
SPARSE_RCNN: list[RenameRule] = [
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


def detr(weights: Mapping[str, Tensor]) -> Weights:
    """facebookresearch/detr, post- and pre-norm."""
    return apply_to_prefix(split_packed(rename(weights, [*DETR, *LAYER, *SELF_FIRST])), "backbone.", rename_backbone)


def deformable_detr(weights: Mapping[str, Tensor]) -> Weights:
    """fundamentalvision/Deformable-DETR; the first norm of a decoder layer follows the cross-attention."""
    renamed = untie_heads(rename(weights, [*DEFORMABLE, *LAYER, *CROSS_FIRST]))
    return apply_to_prefix(split_packed(renamed), "backbone.", rename_backbone)


def dino(weights: Mapping[str, Tensor]) -> Weights:
    """IDEA-Research/DINO, one pair of heads for all layers; the first norm of a layer follows the cross-attention.

    The last label vector belongs to filling, whose content is zero: their file has a row there that nothing reads.
    """
    renamed = split_packed(rename(weights, [*DINO, *LAYER, *CROSS_FIRST]))
    labels = renamed.get("selector.denoising_class_embed.weight")
    if labels is not None:
        renamed["selector.denoising_class_embed.weight"] = torch.cat([labels[:-1], torch.zeros_like(labels[-1:])])
    return apply_to_prefix(renamed, "backbone.", rename_backbone)


def rt_detr(weights: Mapping[str, Tensor]) -> Weights:
    """lyuwenyu/RT-DETR, versions 1 and 2."""
    renamed = rename(weights, [*SELECTING, *HYBRID, *LAYER, *SELF_FIRST])
    return apply_to_prefix(split_packed(renamed), "backbone.", rename_backbone)


def d_fine(weights: Mapping[str, Tensor]) -> Weights:
    """Peterande/D-FINE; DEIM and RT-DETRv4 keep the names."""
    renamed = rename(weights, [*D_FINE, *SELECTING, *D_FINE_AUTHORS, *LAYER, *SELF_FIRST])
    return apply_to_prefix(split_packed(split_pairs(_of_floats(renamed))), "backbone.", rename_backbone)


def deimv2(weights: Mapping[str, Tensor]) -> Weights:
    """Intellindust-AI-Lab/DEIMv2, all sizes."""
    lite = LITE if any(name.startswith("encoder.bi_fusion.") for name in weights) else []
    renamed = rename(weights, [*DEIMV2, *SELECTING, *DEIMV2_AUTHORS, *LAYER, *SELF_FIRST, *RMS_SCALES, *lite])
    return apply_to_prefix(one_box_head(split_packed(split_pairs(_of_floats(renamed)))), "backbone.", rename_backbone)


def _of_floats(weights: Weights) -> Weights:
    """Constants of the bins as float32: the authors' configurations write some as whole numbers, and so do files."""
    return {name: tensor.float() if ".bins." in name else tensor for name, tensor in weights.items()}


def conditional_detr(weights: Mapping[str, Tensor]) -> Weights:
    """Atten4Vis/ConditionalDETR."""
    renamed = rename(weights, [*REFERENCE_POINT, *CONDITIONAL_HEADS, *CONDITIONAL_PROJECTIONS, *LAYER, *SELF_FIRST])
    return apply_to_prefix(split_packed(renamed), "backbone.", rename_backbone)


def dab_detr(weights: Mapping[str, Tensor]) -> Weights:
    """IDEA-Research/DAB-DETR and IDEA-Research/DN-DETR."""
    renamed = rename(weights, [*REFERENCE_BOX, *CONDITIONAL_HEADS, *CONDITIONAL_PROJECTIONS, *LAYER, *SELF_FIRST])
    return apply_to_prefix(split_packed(renamed), "backbone.", rename_backbone)


def anchor_detr(weights: Mapping[str, Tensor]) -> Weights:
    """megvii-research/AnchorDETR, one feature level; every layer's copy of the heads is the same."""
    renamed = rename(weights, [*ANCHOR, *LAYER])
    return apply_to_prefix(split_packed(split_packed(renamed), ROW_COLUMN), "backbone.", rename_backbone)


def sparse_rcnn(weights: Mapping[str, Tensor]) -> Weights:
    return rename(split_packed(weights), SPARSE_RCNN)
