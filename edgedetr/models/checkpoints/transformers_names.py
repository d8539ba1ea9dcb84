"""Names in transformers' layouts, as files on the hub and as in memory: DETR, Table Transformer, RT-DETR v1 and v2,
Deformable DETR."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.head_copies import own_heads
from edgedetr.models.checkpoints.rename_rules import Rule, Weights, below, rename
from edgedetr.models.checkpoints.resnet_names import rename_backbone

# Parts that transformers names alike in all its detectors.
PARTS: list[Rule] = [
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
DETR: list[Rule] = [
    (r"^class_labels_classifier\.", "decoder.boxes.score."),
    (r"^bbox_predictor\.", "decoder.boxes.box."),
    (r"^model\.query_position_embeddings\.", "selector.position."),
    (r"^model\.input_projection\.", "encoder.project."),
    (r"^model\.(?:backbone\.)?position_embedding\.row_embeddings\.", "encoder.position.row."),
    (r"^model\.(?:backbone\.)?position_embedding\.column_embeddings\.", "encoder.position.column."),
]
# The hybrid encoder's inner names are those of RT-DETR's own files.
HYBRID: list[Rule] = [
    (r"^encoder\.lateral_convs\.", "encoder.lateral."),
    (r"^encoder\.downsample_convs\.", "encoder.downsample."),
    (r"^encoder\.fpn_blocks\.", "encoder.top_down."),
    (r"^encoder\.pan_blocks\.", "encoder.bottom_up."),
    (r"\.bottlenecks\.(\d)\.conv1\.", r".blocks.\1.wide."),
    (r"\.bottlenecks\.(\d)\.conv2\.", r".blocks.\1.narrow."),
    (r"^(encoder\.(?:top_down|bottom_up)\.\d)\.conv1\.", r"\1.deep."),
    (r"^(encoder\.(?:top_down|bottom_up)\.\d)\.conv2\.", r"\1.flat."),
    (r"^(encoder\.(?:top_down|bottom_up)\.\d)\.conv3\.", r"\1.merge."),
]
RT_DETR: list[Rule] = [
    (r"^model\.encoder_input_proj\.(\d)\.0\.", r"encoder.project.\1.conv."),
    (r"^model\.encoder_input_proj\.(\d)\.1\.", r"encoder.project.\1.norm."),
    (r"^model\.decoder_input_proj\.(\d)\.0\.", r"encoder.memory_project.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d)\.1\.", r"encoder.memory_project.\1.norm."),
    (r"^model\.encoder\.(?:aifi|encoder)\.0\.layers\.(\d)\.", r"encoder.attention.\1."),
    (r"^model\.encoder\.(?=lateral|downsample|fpn|pan)", "encoder."),
    *HYBRID,
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
DEFORMABLE: list[Rule] = [
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


def detr(weights: Mapping[str, Tensor]) -> Weights:
    """DetrForObjectDetection and TableTransformerForObjectDetection."""
    return below(rename(weights, [*DETR, *PARTS]), "backbone.", rename_backbone)


def rt_detr(weights: Mapping[str, Tensor]) -> Weights:
    """RTDetrForObjectDetection and RTDetrV2ForObjectDetection."""
    return below(rename(weights, [*RT_DETR, *PARTS]), "backbone.", rename_backbone)


def deformable_detr(weights: Mapping[str, Tensor]) -> Weights:
    """DeformableDetrForObjectDetection: one-stage, refined, two-stage."""
    return below(own_heads(rename(weights, [*DEFORMABLE, *PARTS])), "backbone.", rename_backbone)
