"""Sparse R-CNN: a feature pyramid, learned boxes, and six heads that each read their boxes and move them.

Sun et al. 2021, "Sparse R-CNN: End-to-End Object Detection with Learnable Proposals".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.dynamic_convolution import DynamicInteraction
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.layers.roi_align import RoiAlign
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import DeltaBoxes
from edgedetr.models.checkpoints import author_names
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.cross_attention import RoiCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.fpn import FeaturePyramid, PyramidEncoder
from edgedetr.models.initialization import packed_qkv, prior_bias_init, xavier
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.queries.learned import LearnedProposals
from edgedetr.options import Range


@dataclass(frozen=True)
class SparseRcnnConfig(TransformerConfig):
    """Sparse R-CNN R50-FPN as published (section 4), with 100 proposals."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"
    ranges: ClassVar[Mapping[str, Range]] = {"class_tower": (0, 100), "box_tower": (0, 100)}

    ffn: int = 2048  # 8 C
    decoder_layers: int = 6  # stages of the cascade; each has its own weights (table 5)
    queries: int = 100  # proposals; 300 have 2 AP more
    dynamic_hidden: int = 64  # width between the two predicted products
    roi_px: int = 7  # bins per side
    roi_samples: int = 2  # bilinear points per side of a bin; 1 needs a quarter of the time
    class_tower: int = 1  # blocks before the class head
    box_tower: int = 3  # and before the box head
    dropout: float = 0.0  # none, as published
    denoising: bool = False  # vectors for noised labels; not in the paper


def sparse_rcnn(config: SparseRcnnConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figures 3 and 4, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(2, 3, 4, 5))

    def stage() -> nn.Module:
        read = RoiCrossAttention(
            RoiAlign(c.roi_px, c.roi_samples), DynamicInteraction(c.hidden, c.roi_px**2, c.dynamic_hidden)
        )
        return DecoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout),
            read,
            FeedForward(c.hidden, c.ffn, "relu", c.dropout, c.dropout),
            c.hidden,
            c.dropout,
        )

    encoder = PyramidEncoder(FeaturePyramid(backbone.channels, backbone.strides, c.hidden))
    boxes = DeltaBoxes(c.hidden, num_classes, c.decoder_layers, c.class_tower, c.box_tower)
    decoder = Decoder([stage() for _ in range(c.decoder_layers)], boxes)
    xavier(decoder)
    prior_bias_init(boxes)
    selector = LearnedProposals(c.queries, c.hidden, num_classes, c.denoising)
    return DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))


MEMBER = Member(
    name="sparse_rcnn",
    config=SparseRcnnConfig,
    builder=sparse_rcnn,
    paper="Sun et al. 2021, arXiv:2011.12450",
    published=(2020, 11),
    roles=at("decoder.layers.*.cross_attention", RoiCrossAttention),
    original_init=packed_qkv("decoder.layers.*.self_attention"),
    layouts=(Layout("PeizeSun/SparseR-CNN", r"^init_proposal_boxes\.", author_names.sparse_rcnn),),
    unreadable=("heads",),
)
