"""Names in files of members whose queries stand at a place: Conditional DETR, DAB-DETR and DN-DETR, Anchor DETR.

The authors of the first two name a decoder layer's projections alike (`sa_qcontent_proj`), and so do Conditional DETR's
files on the hub; transformers has names of its own in memory, and for DAB-DETR in files as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.author_names import LAYER, SELF_FIRST
from edgedetr.models.checkpoints.rename_rules import Rule, Weights, below, rename, split_packed
from edgedetr.models.checkpoints.resnet_names import rename_backbone
from edgedetr.models.checkpoints.transformers_names import PARTS

# sa_qcontent_proj, sa_kpos_proj, ca_v_proj, ca_qpos_sine_proj of the authors -> q, k_position, v, q_spatial.
AUTHORS: list[Rule] = [
    (r"\.sa_", ".self_attention."),
    (r"\.ca_", ".cross_attention."),
    (r"\.([qkv])(?:content)?_proj\.", r".\1."),
    (r"\.qpos_sine_proj\.", ".q_spatial."),
    (r"\.([qk])pos_proj\.", r".\1_position."),
]
# q_content_proj, q_pos_proj, q_pos_sine_proj of transformers in memory.
IN_MEMORY: list[Rule] = [
    (r"\.([qk])_content_proj\.", r".\1."),
    (r"\.q_pos_sine_proj\.", ".q_spatial."),
    (r"\.([qk])_pos_proj\.", r".\1_position."),
]
# cross_attn.cross_attn_query_pos_sine_proj of transformers' DAB-DETR, whose layers have a module around each part.
DAB_LAYER: list[Rule] = [
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
# What the decoder owns beside its layers; `model.` on the hub, `transformer.` in the authors' files.
OWNED: list[Rule] = [
    (r"^(?:model|transformer)\.encoder\.query_scale\.", "encoder.position_scale."),
    (r"^(?:model|transformer)\.decoder\.query_scale\.", "decoder.spatial.scale."),
    (r"^(?:model|transformer)\.decoder\.ref_anchor_head\.", "decoder.spatial.size."),
]
POINT: list[Rule] = [(r"^(?:model|transformer)\.decoder\.ref_point_head\.", "selector.point.head."), *OWNED]
BOX: list[Rule] = [(r"^(?:model|transformer)\.decoder\.ref_point_head\.", "decoder.query_position.head."), *OWNED]
HUB_HEADS: list[Rule] = [
    (r"^(?:class_labels_classifier|class_embed)\.", "decoder.boxes.score."),
    (r"^(?:bbox_predictor|model\.decoder\.bbox_embed)\.", "decoder.boxes.box."),
    (r"^model\.input_projection\.", "encoder.project."),
    (r"^model\.query_position_embeddings\.", "selector.position."),
    (r"^model\.query_refpoint_embeddings\.", "selector.box."),
]
AUTHORS_HEADS: list[Rule] = [
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
ANCHOR: list[Rule] = [
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
AXES = ("q_x", "q_y", "k_x", "k_y", "v")  # row-column attention's packed projection; "row" there is along x


def hub_conditional(weights: Mapping[str, Tensor]) -> Weights:
    """ConditionalDetrForObjectDetection, as files and as in memory."""
    return below(rename(weights, [*POINT, *HUB_HEADS, *AUTHORS, *IN_MEMORY, *PARTS]), "backbone.", rename_backbone)


def original_conditional(weights: Mapping[str, Tensor]) -> Weights:
    """Atten4Vis/ConditionalDETR."""
    renamed = rename(weights, [*POINT, *AUTHORS_HEADS, *AUTHORS, *LAYER, *SELF_FIRST])
    return below(split_packed(renamed), "backbone.", rename_backbone)


def hub_dab(weights: Mapping[str, Tensor]) -> Weights:
    """DabDetrForObjectDetection."""
    return below(rename(weights, [*BOX, *HUB_HEADS, *DAB_LAYER, *PARTS]), "backbone.", rename_backbone)


def original_dab(weights: Mapping[str, Tensor]) -> Weights:
    """IDEA-Research/DAB-DETR and IDEA-Research/DN-DETR."""
    renamed = rename(weights, [*BOX, *AUTHORS_HEADS, *AUTHORS, *LAYER, *SELF_FIRST])
    return below(split_packed(renamed), "backbone.", rename_backbone)


def anchor(weights: Mapping[str, Tensor]) -> Weights:
    """megvii-research/AnchorDETR, one feature level; every layer's copy of the heads is the same."""
    renamed = rename(weights, [*ANCHOR, *LAYER])
    return below(split_packed(split_packed(renamed), AXES), "backbone.", rename_backbone)
