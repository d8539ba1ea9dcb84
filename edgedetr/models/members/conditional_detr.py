"""Conditional DETR: DETR whose queries stand at a point, and whose heads compare places apart from content.

Meng et al. 2021, "Conditional DETR for Fast Training Convergence".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.conditional_attention import ConditionalSelfAttention, SpatialQuery
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.layers.position import SinePosition
from edgedetr.models.decoder import AbsoluteBoxes, ConditionalCrossAttention, Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.dense import DenseEncoder, EncoderLayer
from edgedetr.models.member_config import TransformerConfig, backbone_of, xavier
from edgedetr.models.queries.anchors import ConditionalQueries
from edgedetr.options import LATER

PRIOR = 0.01  # class probability that the head starts from (RetinaNet, section 4.1)


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
    # Decoder layers begin with normalized content (see models/decoder.py).
    norm_between: bool = field(default=False, metadata=LATER)


def conditional_detr(config: ConditionalDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figures 3 and 4, with random weights."""
    c = config
    backbone = backbone_of(c, levels=(5,), dilate_last=c.dilate_last)

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
    rare_and_unmoved(heads)
    return detector


def rare_and_unmoved(heads: AbsoluteBoxes) -> None:
    """Fresh heads: every class rare, every box where its reference is."""
    nn.init.constant_(heads.score.bias, -math.log((1 - PRIOR) / PRIOR))
    nn.init.zeros_(heads.box.layers[-1].weight)  # type: ignore[arg-type]  # mypy does not know a ModuleList's content
    nn.init.zeros_(heads.box.layers[-1].bias)  # type: ignore[arg-type]  # not known to mypy
