"""DINO: Deformable DETR whose queries begin at proposed boxes with learned content, trained with contrastive denoising.

Zhang et al. 2022, "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection". The three parts
that the paper adds: denoising with negative copies (section 3.3, training/denoising.py), mixed query selection (3.4),
and boxes that learn through the layer after them as well, "look forward twice" (3.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import AbsoluteBoxes
from edgedetr.models.checkpoints import author_names
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, deformable_decoder_layers
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.deformable import DeformableEncoder, DeformableLayer, deformable_encoder_layers
from edgedetr.models.initialization import packed_qkv, prior_bias_init, xavier_rule, zero_box_init
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.members.deformable_detr import SAMPLING_READERS
from edgedetr.models.queries.learned import BoxPosition
from edgedetr.models.queries.two_stage import TopKQueries

TEMPERATURE = 20.0  # of the image's position, as in DAB-DETR; its cells are counted from 1 and not from their centers


@dataclass(frozen=True)
class DinoConfig(TransformerConfig):
    """DINO-4scale with a ResNet-50, as published (section 4.1 and the authors' config/DINO/DINO_4scale.py)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"

    levels: int = 4  # C3, C4, C5 and a stride-2 convolution of C5; 3: without the last; 5: with C2
    points: int = 4  # samples per head and level
    ffn: int = 2048  # 8 C
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 900  # boxes per image; 300 of the paper's detections are scored
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    dropout: float = 0.0  # none, as published
    denoising: bool = True  # vectors for noised labels

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels not in (3, 4, 5) or self.points < 1:
            raise ModelError(
                f"model.levels is {self.levels}, model.points {self.points}; expected 3 (C3 to C5), 4 (and a coarser "
                "one) or 5 (and C2) levels, and at least 1 point"
            )


def dino(config: DinoConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 2, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(2, 3, 4, 5) if c.levels == 5 else (3, 4, 5))
    points = (c.points,) * c.levels

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.ffn, "relu", c.dropout, c.dropout)

    encoder_layers = deformable_encoder_layers(
        c.encoder_layers, c.hidden, c.heads, points, feedforward, c.sampling, c.dropout
    )
    encoder = DeformableEncoder(
        backbone.channels, backbone.strides, c.hidden, c.levels, encoder_layers, TEMPERATURE, offset=0.0
    )
    # Mixed selection: the boxes are the proposals', the content is learned.
    selector = TopKQueries(c.hidden, num_classes, c.queries, c.denoising, learned_content=True)
    heads = AbsoluteBoxes(c.hidden, num_classes, iterative=True)  # one pair for all layers, as published
    decoder_layers = deformable_decoder_layers(
        c.decoder_layers, c.hidden, c.heads, points, feedforward, c.sampling, c.dropout
    )
    decoder = Decoder(decoder_layers, heads, query_position=BoxPosition(c.hidden), norm=nn.LayerNorm(c.hidden))
    prior_bias_init(selector, heads)
    zero_box_init(selector, heads)
    return DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))


MEMBER = Member(
    name="dino",
    config=DinoConfig,
    builder=dino,
    paper="Zhang et al. 2022, arXiv:2203.03605",
    published=(2022, 3),
    roles={
        **at("encoder.layers.*", DeformableLayer),
        **at("decoder.layers.*.cross_attention", DeformableCrossAttention),
        **at("selector", TopKQueries),
    },
    original_init=packed_qkv("decoder.layers.*.self_attention")
    | {"*.feedforward.*.weight": xavier_rule, "decoder.query_position.*.weight": xavier_rule},
    layouts=(Layout("IDEA-Research/DINO", r"^transformer\.enc_out_class_embed\.", author_names.dino),),
    readers=SAMPLING_READERS,
    unreadable=("heads",),
)
