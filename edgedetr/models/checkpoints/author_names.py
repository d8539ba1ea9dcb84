"""Names in the files that the authors published: facebookresearch/detr, Deformable-DETR, RT-DETR v1 and v2."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.head_copies import own_heads
from edgedetr.models.checkpoints.rename_rules import Rule, Weights, below, rename, split_packed
from edgedetr.models.checkpoints.resnet_names import rename_backbone
from edgedetr.models.checkpoints.transformers_names import HYBRID

# torch.nn.Transformer's names of a layer, which all of them keep; the order of the decoder's norms is not shared.
LAYER: list[Rule] = [
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
SELF_FIRST: list[Rule] = [
    (r"^(decoder\..*)\.norm1\.", r"\1.self_norm."),
    (r"^(decoder\..*)\.norm2\.", r"\1.cross_norm."),
]
CROSS_FIRST: list[Rule] = [
    (r"^(decoder\..*)\.norm1\.", r"\1.cross_norm."),
    (r"^(decoder\..*)\.norm2\.", r"\1.self_norm."),
]

DETR: list[Rule] = [
    (r"^backbone\.1\.row_embed\.", "encoder.position.row."),
    (r"^backbone\.1\.col_embed\.", "encoder.position.column."),
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.", ""),
    (r"^input_proj\.", "encoder.project."),
    (r"^query_embed\.", "selector.position."),
    (r"^class_embed\.", "decoder.boxes.score."),
    (r"^bbox_embed\.", "decoder.boxes.box."),
]
DEFORMABLE: list[Rule] = [
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
RT_DETR: list[Rule] = [
    (
        r"^(encoder|decoder)\.input_proj\.(\d)\.(?:0|conv)\.",
        lambda m: f"encoder.{'project' if m[1] == 'encoder' else 'memory_project'}.{m[2]}.conv.",
    ),
    (
        r"^(encoder|decoder)\.input_proj\.(\d)\.(?:1|norm)\.",
        lambda m: f"encoder.{'project' if m[1] == 'encoder' else 'memory_project'}.{m[2]}.norm.",
    ),
    (r"^encoder\.encoder\.0\.layers\.", "encoder.attention."),
    *HYBRID,
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


def detr(weights: Mapping[str, Tensor]) -> Weights:
    """facebookresearch/detr, post- and pre-norm."""
    return below(split_packed(rename(weights, [*DETR, *LAYER, *SELF_FIRST])), "backbone.", rename_backbone)


def deformable_detr(weights: Mapping[str, Tensor]) -> Weights:
    """fundamentalvision/Deformable-DETR; its first norm of a decoder layer follows the cross-attention."""
    renamed = own_heads(rename(weights, [*DEFORMABLE, *LAYER, *CROSS_FIRST]))
    return below(split_packed(renamed), "backbone.", rename_backbone)


def rt_detr(weights: Mapping[str, Tensor]) -> Weights:
    """lyuwenyu/RT-DETR, versions 1 and 2."""
    return below(split_packed(rename(weights, [*RT_DETR, *LAYER, *SELF_FIRST])), "backbone.", rename_backbone)
