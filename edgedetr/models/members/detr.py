"""DETR: C5 of a ResNet, a dense transformer, learned queries.

Carion et al. 2020, "End-to-End Object Detection with Transformers".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.layers.position import LearnedPosition, NoPosition, SequencePosition, SinePosition
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import AbsoluteBoxes
from edgedetr.models.checkpoints import author_names, transformers_keys, transformers_names
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, has
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass
from edgedetr.models.cross_attention import DenseCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.dense import DenseEncoder, EncoderLayer
from edgedetr.models.initialization import PROJECTION, packed_qkv, xavier
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.queries.learned import LearnedQueries
from edgedetr.options import LATER, Range


@dataclass(frozen=True)
class DetrConfig(TransformerConfig):
    """DETR-R50 as published (section A.4)."""

    activation: ClassVar[str] = "softmax"  # of the class logits; the last one is "no object"
    class_loss: ClassVar[str] = "softmax_ce"
    ranges: ClassVar[Mapping[str, Range]] = {"box_layers": (1, 100)}

    dilate_last: bool = False  # C5 at stride 16 (DC5): better on small objects, 4x the tokens
    ffn: int = 2048  # 8 C
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 100  # more than objects in any COCO image
    position: Literal["sine", "learned", "sequence", "none"] = "sine"
    position_at: Literal["every_layer", "input"] = "every_layer"  # at the encoder's input
    # alone; table 3's nearest form, the decoder's as well, loses 1.4 AP
    position_on_value: bool = False  # values of cross-attention carry no position in the original
    skip_first_self_attention: bool = False  # of the decoder, whose queries have no content yet (section A.3)
    box_layers: int = 3  # of the box head; the class head is one Linear
    pre_norm: bool = False  # LayerNorm before each part (Table Transformer) instead of after
    dropout: float = 0.1
    ffn_activation: Literal["relu", "gelu", "silu"] = "relu"
    # The decoder normalizes the content between its layers (Decoder.norm_between).
    norm_between: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.box_layers < 1:
            raise ModelError(f"model.box_layers is {self.box_layers}; expected at least 1")


POSITIONS: dict[str, Callable[[int], nn.Module]] = {
    "sine": SinePosition,
    "learned": LearnedPosition,
    "sequence": lambda dim: SequencePosition(dim, 2500),  # 1600 x 1600 px at stride 32
    "none": lambda dim: NoPosition(),
}


def detr(config: DetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 2, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(5,), dilate_last=c.dilate_last)

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.ffn, c.ffn_activation, c.dropout, c.dropout)

    def encoder_layer() -> nn.Module:
        return EncoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout), feedforward(), c.hidden, c.dropout, c.pre_norm
        )

    def decoder_layer(index: int) -> nn.Module:
        skipped = c.skip_first_self_attention and index == 0
        return DecoderLayer(
            None if skipped else MultiHeadAttention(c.hidden, c.heads, c.dropout),
            DenseCrossAttention(c.hidden, c.heads, c.dropout, c.position_on_value),
            feedforward(),
            c.hidden,
            c.dropout,
            c.pre_norm,
        )

    encoder = DenseEncoder(
        backbone.channels[-1],
        backbone.strides[-1],
        c.hidden,
        POSITIONS[c.position](c.hidden),
        [encoder_layer() for _ in range(c.encoder_layers)],
        nn.LayerNorm(c.hidden) if c.pre_norm else nn.Identity(),
        once=c.position_at == "input",
    )
    decoder = Decoder(
        [decoder_layer(index) for index in range(c.decoder_layers)],
        AbsoluteBoxes(c.hidden, num_classes + 1, box_layers=c.box_layers),
        norm=nn.LayerNorm(c.hidden),
        norm_between=c.norm_between,
    )
    detector = DetrModel(backbone, encoder, LearnedQueries(c.queries, c.hidden), decoder, Normalize(c.mean, c.std))
    xavier(encoder.layers, decoder.layers)
    return detector


def _position(state: StateDict) -> str | None:
    """Learned positions are tensors; sine and none are not, and sine is the default."""
    if state.has("encoder.position.row.weight"):
        return "learned"
    return "sequence" if state.has("encoder.position.table") else None


MEMBER = Member(
    name="detr",
    config=DetrConfig,
    builder=detr,
    paper="Carion et al. 2020, arXiv:2005.12872",
    published=(2020, 5),
    roles=at("decoder.layers.*.cross_attention", DenseCrossAttention),
    original_init=packed_qkv("*attention") | PROJECTION,
    layouts=(
        Layout("transformers", r"^model\.query_position_embeddings\.", transformers_names.detr),
        Layout("facebookresearch/detr", r"^query_embed\.", author_names.detr),
    ),
    transformers={
        "detr": TransformersClass("DetrForObjectDetection", transformers_keys.DETR),
        "table-transformer": TransformersClass("TableTransformerForObjectDetection", transformers_keys.DETR),
    },
    readers={"position": _position, "pre_norm": has("encoder.norm.weight")},
    unreadable=("heads", "dilate_last", "ffn_activation", "position"),
)
