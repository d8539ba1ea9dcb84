"""DN-DETR: DAB-DETR, whose queries are boxes that every layer moves, trained with noised queries (denoising).

Li et al. 2022, "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising"; Liu et al. 2022, "DAB-DETR: Dynamic
Anchor Boxes are Better Queries for DETR". The noise is drawn in training/denoising.py; the label embedding is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.conditional_attention import ConditionalSelfAttention, SpatialQuery
from edgedetr.layers.feedforward import FeedForward, Mlp
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
from edgedetr.models.queries.learned import BoxPosition, BoxQueries

TEMPERATURE = 20.0  # of the image's position: shorter waves than DETR's 10000 (DAB-DETR, section 4.5)


@dataclass(frozen=True)
class DnDetrConfig(TransformerConfig):
    """DN-DETR-R50 as published (section 5.1)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"

    dilate_last: bool = False  # C5 at stride 16 (DC5)
    ffn: int = 2048  # 8 C
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 300
    ffn_activation: Literal["prelu", "relu", "gelu", "silu"] = "prelu"
    dropout: float = 0.0  # none, as published
    denoising: bool = True  # vectors for labels; without them this is DAB-DETR


def dn_detr(config: DnDetrConfig, num_classes: int) -> DetrModel:
    """The network of DAB-DETR's figure 5 with DN-DETR's label vectors, with random weights."""
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
        SinePosition(c.hidden, TEMPERATURE),
        [
            EncoderLayer(MultiHeadAttention(c.hidden, c.heads, c.dropout), feedforward(), c.hidden, c.dropout)
            for _ in range(c.encoder_layers)
        ],
        nn.Identity(),
        position_scale=Mlp(c.hidden, c.hidden, c.hidden, 2),
    )
    heads = AbsoluteBoxes(c.hidden, num_classes, iterative=True)
    decoder = Decoder(
        [decoder_layer(number) for number in range(c.decoder_layers)],
        heads,
        query_position=BoxPosition(c.hidden),
        norm=nn.LayerNorm(c.hidden),
        spatial=SpatialQuery(c.hidden, sized=True),
    )
    selector = BoxQueries(c.queries, c.hidden, num_classes, c.denoising)
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    xavier(encoder.layers, decoder.layers)
    prior_bias_init(heads)
    zero_box_init(heads)
    return detector


MEMBER = Member(
    name="dn_detr",
    config=DnDetrConfig,
    builder=dn_detr,
    paper="Li et al. 2022, arXiv:2203.01305; Liu et al. 2022, arXiv:2201.12329",
    published=(2022, 3),
    roles=at("decoder.layers.*.cross_attention", ConditionalCrossAttention),
    original_init=packed_qkv("encoder.layers.*.attention")
    | PROJECTION
    | CONDITIONAL_BIASES
    | {
        "encoder.position_scale.*.weight": xavier_rule,
        "decoder.query_position.*.weight": xavier_rule,
        "decoder.spatial.*.weight": xavier_rule,
    },
    layouts=(
        Layout("transformers (DAB-DETR)", r"^model\.query_refpoint_embeddings\.", transformers_names.dab_detr),
        Layout("IDEA-Research/DAB-DETR, DN-DETR", r"^refpoint_embed\.", author_names.dab_detr),
    ),
    transformers={"dab-detr": TransformersClass("DabDetrForObjectDetection", transformers_keys.DAB)},
    unreadable=("heads", "dilate_last", "ffn_activation"),
)
