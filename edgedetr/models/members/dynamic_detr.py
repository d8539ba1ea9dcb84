"""Dynamic DETR: an encoder of dynamic convolutions on a pyramid, and a decoder that reads the content of boxes.

Dai et al. 2021, "Dynamic DETR: End-to-End Object Detection with Dynamic Attention". There is no published code. Where
the paper leaves it open, this follows the authors' Dynamic Head (encoder) and Sparse R-CNN (decoder): box deltas as in
R-CNN, RoIAlign on the level that fits a box's size, one set of encoder weights for all levels of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.dynamic_convolution import DynamicInteraction
from edgedetr.layers.feedforward import FeedForward, Mlp
from edgedetr.layers.norm import Normalize
from edgedetr.layers.roi_align import RoiAlign
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import DeltaBoxes
from edgedetr.models.checkpoints.config_from_state_dict import StateDict
from edgedetr.models.cross_attention import RoiCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.dynamic import GROUPS, DynamicPyramidLayer
from edgedetr.models.encoders.fpn import FeaturePyramid, PyramidEncoder
from edgedetr.models.initialization import prior_bias_init, xavier, zero_box_init
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.queries.learned import LearnedProposals
from edgedetr.options import LATER


@dataclass(frozen=True)
class DynamicDetrConfig(TransformerConfig):
    """Dynamic DETR R50 as the paper describes it (section 4.1)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"

    ffn: int = 2048  # 8 C
    encoder_layers: int = 6
    dynamic_relu: bool = True  # False: plain ReLU, which is cheaper and fuses into the convolution
    # How much of each level goes into a sum: one number per map (the authors' Dynamic Head), or one per channel by
    # squeeze-and-excitation, as this paper has it (section 3.2); recipe dynamic-detr-r50 uses the paper's.
    scale_attention: Literal["scalar", "channel"] = field(default="scalar", metadata=LATER)
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    decoder_layers: int = 6
    queries: int = 300
    dynamic_layers: Literal[1, 2] = 2  # 1: the full C x C product of figure 4; 2: through dynamic_hidden
    dynamic_hidden: int = 64  # as Sparse R-CNN
    roi_px: int = 7  # bins per side (section 3.3)
    roi_samples: int = 2  # bilinear points per side of a bin
    dropout: float = 0.0  # none, as in Sparse R-CNN
    denoising: bool = False  # vectors for noised labels; not in the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % GROUPS:
            raise ModelError(f"model.hidden is {self.hidden}; expected a multiple of {GROUPS}")


def dynamic_detr(config: DynamicDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 2, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(3, 4, 5))

    def decoder_layer() -> nn.Module:
        read = RoiCrossAttention(
            RoiAlign(c.roi_px, c.roi_samples),
            DynamicInteraction(c.hidden, c.roi_px**2, c.dynamic_hidden, c.dynamic_layers),
        )
        return DecoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout),
            read,
            FeedForward(c.hidden, c.ffn, "relu", c.dropout, c.dropout),
            c.hidden,
            c.dropout,
        )

    encoder = PyramidEncoder(
        FeaturePyramid(backbone.channels, backbone.strides, c.hidden, extra="conv"),
        [DynamicPyramidLayer(c.hidden, c.dynamic_relu, c.sampling, c.scale_attention) for _ in range(c.encoder_layers)],
    )
    boxes = DeltaBoxes(c.hidden, num_classes, c.decoder_layers, class_tower=0, box_tower=0)
    decoder = Decoder(
        [decoder_layer() for _ in range(c.decoder_layers)], boxes, query_position=Mlp(4, 2 * c.hidden, c.hidden, 2)
    )
    xavier(decoder)
    prior_bias_init(boxes)
    # With Xavier's weights and no towers before the heads, most boxes would leave the image and read nothing.
    zero_box_init(boxes)
    selector = LearnedProposals(c.queries, c.hidden, num_classes, c.denoising)
    return DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))


def _scale_attention(state: StateDict) -> str | None:
    return "channel" if state.has("encoder.layers.0.scale.squeeze.weight") else None


MEMBER = Member(
    name="dynamic_detr",
    config=DynamicDetrConfig,
    builder=dynamic_detr,
    paper='Dai et al. 2021, ICCV, "Dynamic DETR"',
    published=(2021, 10),
    roles={**at("encoder.layers.*", DynamicPyramidLayer), **at("decoder.layers.*.cross_attention", RoiCrossAttention)},
    readers={"scale_attention": _scale_attention},
    unreadable=("heads",),
)
