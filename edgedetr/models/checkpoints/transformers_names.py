"""Tensor names of transformers' detectors, as in files on the Hugging Face hub and as in memory.

DETR, Table Transformer, Deformable DETR, RT-DETR versions 1 and 2, D-FINE, DEIMv2, Conditional DETR, DAB-DETR.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.author_names import CONDITIONAL_PROJECTIONS, REFERENCE_BOX, REFERENCE_POINT
from edgedetr.models.checkpoints.backbone_names import rename_backbone
from edgedetr.models.checkpoints.hybrid_names import D_FINE_HUB, DEIMV2_HUB, HYBRID, split_pairs
from edgedetr.models.checkpoints.rename_rules import (
    RenameRule,
    Weights,
    apply_to_prefix,
    one_box_head,
    rename,
    untie_heads,
)

# Parts that transformers names alike in all its detectors.
PARTS: list[RenameRule] = [
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?", "backbone."),
    (r"^model\.encoder\.layernorm\.", "encoder.norm."),
    (r"^model\.decoder\.layernorm\.", "decoder.norm."),
    (r"^model\.encoder\.layers\.", "encoder.layers."),
    (r"^model\.decoder\.layers\.", "decoder.layers."),
    (r"\.(?:mlp\.)?fc1\.", ".feedforward.up."),
    (r"\.(?:mlp\.)?fc2\.", ".feedforward.down."),
    (r"\.final_layer_norm\.", ".feedforward_norm."),
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".weights."),
    (r"\.value_proj\.", ".value."),
    (r"\.output_proj\.", ".out."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.(?:out_proj|o_proj)\.", ".out."),
    (r"^(decoder\..*)\.self_attn_layer_norm\.", r"\1.self_norm."),
    (r"\.self_attn_layer_norm\.", ".attention_norm."),
    (r"^(decoder\..*)\.self_attn\.", r"\1.self_attention."),
    (r"\.self_attn\.", ".attention."),
    (r"\.encoder_attn_layer_norm\.", ".cross_norm."),
    (r"\.encoder_attn\.", ".cross_attention."),
]
DETR: list[RenameRule] = [
    (r"^class_labels_classifier\.", "decoder.boxes.score."),
    (r"^bbox_predictor\.", "decoder.boxes.box."),
    (r"^model\.query_position_embeddings\.", "selector.position."),
    (r"^model\.input_projection\.", "encoder.project."),
    (r"^model\.(?:backbone\.)?position_embedding\.row_embeddings\.", "encoder.position.row."),
    (r"^model\.(?:backbone\.)?position_embedding\.column_embeddings\.", "encoder.position.column."),
]
# RT-DETR and D-FINE, beside the parts of the hybrid encoder.
SELECTING: list[RenameRule] = [
    (r"^model\.encoder_input_proj\.(\d)\.0\.", r"encoder.project.\1.conv."),
    (r"^model\.encoder_input_proj\.(\d)\.1\.", r"encoder.project.\1.norm."),
    (r"^model\.decoder_input_proj\.(\d)\.0\.", r"encoder.memory_project.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d)\.1\.", r"encoder.memory_project.\1.norm."),
    (r"^model\.encoder\.(?:aifi|encoder)\.0\.layers\.(\d)\.", r"encoder.attention.\1."),
    (r"^model\.encoder\.(?=lateral|downsample|fpn|pan)", "encoder."),
    (r"^model\.enc_output\.0\.", "selector.project."),
    (r"^model\.enc_output\.1\.", "selector.norm."),
    (r"^model\.enc_score_head\.", "selector.score."),
    (r"^model\.enc_bbox_head\.", "selector.box."),
    (r"^model\.denoising_class_embed\.", "selector.denoising_class_embed."),
    (r"^model\.weight_embedding\.", "selector.content."),
    (r"^(?:model\.decoder\.)?class_embed\.", "decoder.boxes.score."),
    (r"^(?:model\.decoder\.)?bbox_embed\.", "decoder.boxes.box."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_position."),
]
D_FINE: list[RenameRule] = [
    (r"^model\.decoder\.pre_bbox_head\.", "decoder.boxes.first."),
    (r"^model\.decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.boxes.quality.\1.confidence."),
    (r"^model\.decoder\.reg_scale$", "decoder.boxes.bins.scale"),
    (r"^model\.decoder\.up$", "decoder.boxes.bins.up"),
    (r"\.gateway\.gate\.", ".gate.weights."),
    (r"\.gateway\.norm\.", ".gate.norm."),
    (r"\.mlp\.layers\.0\.", ".feedforward.up."),  # in memory; fc1 and fc2 in files
    (r"\.mlp\.layers\.1\.", ".feedforward.down."),
]
DEIMV2: list[RenameRule] = [
    (r"^model\.conv_encoder\.encoder_input_proj\.(\d)\.", r"encoder.project.\1."),
    (r"^model\.conv_encoder\.(?:model\.)?", "backbone."),
    (r"^model\.encoder\.input_proj\.0\.", "encoder.project."),  # of the lite encoder
    (r"^model\.encoder\.(?=down_conv|bi_fusion)", "encoder."),
    (r"^(model\.decoder\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.", r"\1.feedforward.\2."),
]
DEFORMABLE: list[RenameRule] = [
    (r"^model\.input_proj\.", "encoder.project."),
    (r"^model\.level_embed$", "encoder.place.level"),
    (r"^model\.query_position_embeddings\.", "selector.embed."),
    (r"^model\.reference_points\.", "selector.reference."),
    (r"^model\.enc_output\.", "selector.project."),
    (r"^model\.enc_output_norm\.", "selector.norm."),
    (r"^model\.pos_trans\.", "selector.place."),
    (r"^model\.pos_trans_norm\.", "selector.place_norm."),
    (r"^model\.decoder\.(class|bbox)_embed\.", r"decoder.\1_embed."),
]
# q_content_proj, q_pos_proj, q_pos_sine_proj of transformers in memory.
IN_MEMORY: list[RenameRule] = [
    (r"\.([qk])_content_proj\.", r".\1."),
    (r"\.q_pos_sine_proj\.", ".q_spatial."),
    (r"\.([qk])_pos_proj\.", r".\1_position."),
]
# cross_attn.cross_attn_query_pos_sine_proj of transformers' DAB-DETR, whose layers have a module around each part.
DAB_LAYER: list[RenameRule] = [
    (r"^model\.decoder\.layers\.", "decoder.layers."),
    (r"^(decoder\..*)\.(self|cross)_attn\.\2_attn_layer_norm\.", r"\1.\2_norm."),
    (r"^(decoder\..*)\.(self|cross)_attn\.\2_attn\.output_proj\.", r"\1.\2_attention.out."),
    (r"^(decoder\..*)\.(self|cross)_attn\.\2_attn_", r"\1.\2_attention."),
    (r"\.query_content_proj\.", ".q."),
    (r"\.query_pos_sine_proj\.", ".q_spatial."),
    (r"\.query_pos_proj\.", ".q_position."),
    (r"\.key_content_proj\.", ".k."),
    (r"\.key_pos_proj\.", ".k_position."),
    (r"^(decoder\.layers\.\d+\.(?:self|cross)_attention)\.value_proj\.", r"\1.v."),
    (r"\.mlp\.final_layer_norm\.", ".feedforward_norm."),
    (r"\.(?:mlp\.)?activation_fn\.", ".feedforward.activation."),
]
CONDITIONAL_HEADS: list[RenameRule] = [
    (r"^(?:class_labels_classifier|class_embed)\.", "decoder.boxes.score."),
    (r"^(?:bbox_predictor|model\.decoder\.bbox_embed)\.", "decoder.boxes.box."),
    (r"^model\.input_projection\.", "encoder.project."),
    (r"^model\.query_position_embeddings\.", "selector.position."),
    (r"^model\.query_refpoint_embeddings\.", "selector.box."),
]


def detr(weights: Mapping[str, Tensor]) -> Weights:
    """DetrForObjectDetection and TableTransformerForObjectDetection."""
    return apply_to_prefix(rename(weights, [*DETR, *PARTS]), "backbone.", rename_backbone)


def rt_detr(weights: Mapping[str, Tensor]) -> Weights:
    """RTDetrForObjectDetection and RTDetrV2ForObjectDetection."""
    return apply_to_prefix(rename(weights, [*SELECTING, *HYBRID, *PARTS]), "backbone.", rename_backbone)


def d_fine(weights: Mapping[str, Tensor]) -> Weights:
    """DFineForObjectDetection."""
    renamed = split_pairs(rename(weights, [*SELECTING, *D_FINE_HUB, *D_FINE, *PARTS]))
    return apply_to_prefix(renamed, "backbone.", rename_backbone)


def deimv2(weights: Mapping[str, Tensor]) -> Weights:
    """Deimv2ForObjectDetection, all sizes."""
    renamed = split_pairs(rename(weights, [*DEIMV2, *SELECTING, *DEIMV2_HUB, *D_FINE, *PARTS]))
    return apply_to_prefix(one_box_head(renamed), "backbone.", rename_backbone)


def deformable_detr(weights: Mapping[str, Tensor]) -> Weights:
    """DeformableDetrForObjectDetection: one-stage, refined, two-stage."""
    return apply_to_prefix(untie_heads(rename(weights, [*DEFORMABLE, *PARTS])), "backbone.", rename_backbone)


def conditional_detr(weights: Mapping[str, Tensor]) -> Weights:
    """ConditionalDetrForObjectDetection, as files and as in memory."""
    return apply_to_prefix(
        rename(weights, [*REFERENCE_POINT, *CONDITIONAL_HEADS, *CONDITIONAL_PROJECTIONS, *IN_MEMORY, *PARTS]),
        "backbone.",
        rename_backbone,
    )


def dab_detr(weights: Mapping[str, Tensor]) -> Weights:
    """DabDetrForObjectDetection."""
    return apply_to_prefix(
        rename(weights, [*REFERENCE_BOX, *CONDITIONAL_HEADS, *DAB_LAYER, *PARTS]), "backbone.", rename_backbone
    )
