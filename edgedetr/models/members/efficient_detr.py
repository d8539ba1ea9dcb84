"""Efficient DETR: a dense head proposes boxes, and one decoder layer refines them.

Yao et al. 2021, "Efficient DETR: Improving End-to-End Object DetrModel with Dense Prior". There is no code by its
authors; where the paper leaves a choice open, the comment at the number states ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgedetr.errors import ModelError
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import IterativeBoxes
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, deformable_decoder_layers
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.deformable import DeformableEncoder, DeformableLayer, deformable_encoder_layers
from edgedetr.models.initialization import prior_bias_init, zero_box_init
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.members.deformable_detr import SAMPLING_READERS
from edgedetr.models.queries.two_stage import DenseQueries
from edgedetr.options import Range


@dataclass(frozen=True)
class EfficientDetrConfig(TransformerConfig):
    """Efficient DETR-R50 as the paper describes it (section 4)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"  # in the dense and in the sparse part, both matched one to one
    ranges: ClassVar[Mapping[str, Range]] = {"first_queries": (1, 10000)}

    levels: int = 4  # C3, C4, C5 and a stride-2 convolution of C5
    points: int = 4  # samples per head and level (Deformable DETR)
    ffn: int = 1024  # 4 C
    encoder_layers: int = 3  # half of Deformable DETR's
    decoder_layers: int = 1  # with dense proposals more layers gain little (figure 2)
    queries: int = 100  # proposals that are kept at the end of training and deployed
    first_queries: int = 300  # proposals at the beginning of training; they fall linearly (section 4.3)
    coordinates: Literal[2, 4] = 4  # the decoder starts from the proposed box, or from its center
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    dropout: float = 0.1
    denoising: bool = False  # vectors for noised labels; not in the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_queries < self.queries:
            raise ModelError(
                f"model.first_queries is {self.first_queries}, less than model.queries, {self.queries}; "
                "expected at least as many at the beginning of training"
            )
        if not 3 <= self.levels <= 5 or self.points < 1:
            raise ModelError(
                f"model.levels is {self.levels}, model.points {self.points}; "
                "expected 3 to 5 levels, and at least 1 point"
            )


def efficient_detr(config: EfficientDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 4, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(3, 4, 5))
    points = (c.points,) * c.levels

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.ffn, "relu", c.dropout, c.dropout)

    encoder_layers = deformable_encoder_layers(
        c.encoder_layers, c.hidden, c.heads, points, feedforward, c.sampling, c.dropout
    )
    encoder = DeformableEncoder(backbone.channels, backbone.strides, c.hidden, c.levels, encoder_layers)
    layers = deformable_decoder_layers(c.decoder_layers, c.hidden, c.heads, points, feedforward, c.sampling, c.dropout)
    heads = IterativeBoxes(c.hidden, num_classes, c.decoder_layers, look_forward_twice=False)
    decoder = Decoder(layers, heads)
    selector = DenseQueries(c.hidden, num_classes, c.queries, c.first_queries, c.coordinates, c.denoising)
    prior_bias_init(selector, heads)
    zero_box_init(selector, heads)
    return DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))


MEMBER = Member(
    name="efficient_detr",
    config=EfficientDetrConfig,
    builder=efficient_detr,
    paper="Yao et al. 2021, arXiv:2104.01318",
    published=(2021, 4),
    roles={
        **at("encoder.layers.*", DeformableLayer),
        **at("decoder.layers.*.cross_attention", DeformableCrossAttention),
        **at("selector", DenseQueries),
    },
    slow_parameters=("*.offsets.*",),  # as Deformable DETR
    readers=SAMPLING_READERS,
    unreadable=("heads", "queries"),
)
