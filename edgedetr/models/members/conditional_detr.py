"""Conditional DETR: DETR whose queries have a reference point; attention compares positions and content separately.

Meng et al. 2021, "Conditional DETR for Fast Training Convergence".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.conditional_attention import ConditionalSelfAttention, SpatialQuery
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.layers.position import SinePosition
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import AbsoluteBoxes
from edgedetr.models.checkpoints import author_names, transformers_keys, transformers_names
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass
from edgedetr.models.cross_attention import ConditionalCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.dense import DenseEncoder, EncoderLayer
from edgedetr.models.initialization import (
    CONDITIONAL_BIASES,
    PROJECTION,
    packed_qkv,
    prior_bias_init,
    xavier,
    xavier_rule,
    zero_box_init,
)
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.queries.learned import ConditionalQueries
from edgedetr.options import LATER


@dataclass(frozen=True)
class ConditionalDetrConfig(TransformerConfig):
    """Conditional DETR-R50 as published (section 4.1)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"

    dilate_last: bool = False  # C5 at stride 16 (DC5): 2.8 AP more, twice the arithmetic
    ffn: int = 2048  # 8 C
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 300  # as published; DETR's 100 cost little less (table 3)
    dropout: float = 0.1
    ffn_activation: Literal["relu", "gelu", "silu"] = "relu"
    # The decoder normalizes the content between its layers (Decoder.norm_between).
    norm_between: bool = field(default=False, metadata=LATER)


def conditional_detr(config: ConditionalDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figures 3 and 4, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(5,), dilate_last=c.dilate_last)

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.ffn, c.ffn_activation, c.dropout, c.dropout)

    def decoder_layer(number: int) -> nn.Module:
        return DecoderLayer(
            ConditionalSelfAttention(c.hidden, c.heads, c.dropout),
            ConditionalCrossAttention(c.hidden, c.heads, c.dropout, first=number == 0),
            feedforward(),
            c.hidden,
            c.dropout,
        )

    encoder = DenseEncoder(
        backbone.channels[-1],
        backbone.strides[-1],
        c.hidden,
        SinePosition(c.hidden),
        [
            EncoderLayer(MultiHeadAttention(c.hidden, c.heads, c.dropout), feedforward(), c.hidden, c.dropout)
            for _ in range(c.encoder_layers)
        ],
        nn.Identity(),
    )
    heads = AbsoluteBoxes(c.hidden, num_classes)
    decoder = Decoder(
        [decoder_layer(number) for number in range(c.decoder_layers)],
        heads,
        norm=nn.LayerNorm(c.hidden),
        spatial=SpatialQuery(c.hidden),
        norm_between=c.norm_between,
    )
    detector = DetrModel(backbone, encoder, ConditionalQueries(c.queries, c.hidden), decoder, Normalize(c.mean, c.std))
    xavier(encoder.layers, decoder.layers)
    prior_bias_init(heads)
    zero_box_init(heads)
    return detector


MEMBER = Member(
    name="conditional_detr",
    config=ConditionalDetrConfig,
    builder=conditional_detr,
    paper="Meng et al. 2021, arXiv:2108.06152",
    published=(2021, 8),
    roles=at("decoder.layers.*.cross_attention", ConditionalCrossAttention),
    original_init=packed_qkv("encoder.layers.*.attention")
    | PROJECTION
    | CONDITIONAL_BIASES
    | {"selector.point.head.layers.*.weight": xavier_rule, "decoder.spatial.*.weight": xavier_rule},
    layouts=(
        Layout("transformers", r"^model\.query_position_embeddings\.", transformers_names.conditional_detr),
        Layout("Atten4Vis/ConditionalDETR", r"^transformer\.decoder\.ref_point_head\.", author_names.conditional_detr),
    ),
    transformers={
        "conditional_detr": TransformersClass("ConditionalDetrForObjectDetection", transformers_keys.CONDITIONAL)
    },
    unreadable=("heads", "dilate_last", "ffn_activation"),
)
