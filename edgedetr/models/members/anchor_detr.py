"""Anchor DETR: queries are patterns at anchor points, and attention is decoupled into rows and columns.

Wang et al. 2021, "Anchor DETR: Query Design for Transformer-Based Object Detection".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.layers.row_column_attention import AxisPosition, RowColumnAttention, RowColumnLayer
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import AbsoluteBoxes
from edgedetr.models.checkpoints import author_names
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, rows_of
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.cross_attention import RowColumnCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.dense import RowColumnEncoder
from edgedetr.models.initialization import (
    box_size_init,
    packed_qkv,
    part_of,
    prior_bias_init,
    torch_default,
    zero_box_init,
)
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.queries.learned import AnchorPoints, AnchorQueries
from edgedetr.options import Range

SIZE_LOGIT = -2.0  # width and height that every box starts from: 0.12 of the image


@dataclass(frozen=True)
class AnchorDetrConfig(TransformerConfig):
    """Anchor DETR-DC5-R50 as published (section 4.1)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"
    ranges: ClassVar[Mapping[str, Range]] = {"patterns": (1, 1000)}

    dilate_last: bool = True  # C5 at stride 16 (DC5): 2.2 AP more than stride 32
    ffn: int = 1024  # 4 C
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 900  # 300 anchor points x 3 patterns; 300 and 1 pattern for the edge
    patterns: int = 3  # objects that one point can detect (table 3)
    points: Literal["learned", "grid"] = "learned"
    dropout: float = 0.0  # none, as published
    denoising: bool = False  # vectors for noised labels, at points; not in the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patterns < 1 or self.queries % self.patterns:
            raise ModelError(f"model.queries is {self.queries}; expected a multiple of model.patterns, {self.patterns}")


def anchor_detr(config: AnchorDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 3, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(5,), dilate_last=c.dilate_last)

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.ffn, "relu", c.dropout, c.dropout)

    axis = AxisPosition(c.hidden)
    encoder = RowColumnEncoder(
        backbone.channels[-1],
        backbone.strides[-1],
        c.hidden,
        axis,
        [
            RowColumnLayer(RowColumnAttention(c.hidden, c.heads, c.dropout), feedforward(), c.hidden, c.dropout)
            for _ in range(c.encoder_layers)
        ],
    )
    selector = AnchorQueries(
        AnchorPoints(c.queries // c.patterns, c.hidden, c.points, axis), c.patterns, c.hidden, num_classes, c.denoising
    )
    heads = AbsoluteBoxes(c.hidden, num_classes)
    decoder = Decoder(
        [
            DecoderLayer(
                MultiHeadAttention(c.hidden, c.heads, c.dropout),
                RowColumnCrossAttention(c.hidden, c.heads, c.dropout),
                feedforward(),
                c.hidden,
                c.dropout,
            )
            for _ in range(c.decoder_layers)
        ],
        heads,
    )
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    prior_bias_init(heads)
    zero_box_init(heads)
    box_size_init(heads, SIZE_LOGIT)
    return detector


def _queries(state: StateDict) -> int | None:
    """Every pattern at every anchor point; points on a grid are not stored."""
    patterns, points = state.rows("selector.pattern.weight"), state.rows("selector.points.points")
    return patterns * points if patterns and points else None


def _points(state: StateDict) -> str:
    return "learned" if state.has("selector.points.points") else "grid"


MEMBER = Member(
    name="anchor_detr",
    config=AnchorDetrConfig,
    builder=anchor_detr,
    paper="Wang et al. 2021, arXiv:2109.07107",
    published=(2021, 9),
    roles=at("decoder.layers.*.cross_attention", RowColumnCrossAttention),
    original_init=packed_qkv("decoder.layers.*.self_attention")
    | {"*attention.out.weight": torch_default}
    | {f"*attention.{name}.weight": part_of(5) for name in ("q_x", "q_y", "k_x", "k_y")}
    | {"encoder.layers.*.attention.v.weight": part_of(5), "decoder.layers.*.cross_attention.v.weight": part_of(5)},
    layouts=(Layout("megvii-research/AnchorDETR", r"^transformer\.adapt_pos1d\.", author_names.anchor_detr),),
    readers={"queries": _queries, "patterns": rows_of("selector.pattern.weight"), "points": _points},
)
