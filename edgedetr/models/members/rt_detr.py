"""RT-DETR: ResNet-vd, hybrid encoder, the best tokens as queries, deformable decoder.

Zhao et al. 2024, "DETRs Beat YOLOs on Real-time Object Detection"; version 2: Lv et al. 2024, "RT-DETRv2".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.feedforward import FeedForward, Mlp
from edgedetr.layers.norm import Normalize
from edgedetr.models.decoder import Decoder, DecoderLayer, DeformableCrossAttention, IterativeBoxes
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.dense import EncoderLayer
from edgedetr.models.encoders.hybrid import HybridEncoder
from edgedetr.models.member_config import TransformerConfig, backbone_of
from edgedetr.models.queries.selection import TopKQueries
from edgedetr.options import LATER

PRIOR = 0.01  # class probability that the heads start from (RetinaNet, section 4.1)


@dataclass(frozen=True)
class RtDetrConfig(TransformerConfig):
    """RT-DETR-R18 as published; the nano recipe narrows it."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "vfl"  # IoU-aware: a query's score says how good its box is (section 4.3)

    version: Literal[1, 2] = 2  # 2 allows `points` to differ per level, and method "discrete"
    backbone: str = "resnet18vd"  # resnet{18,34,50,101}[vd], vit_{tiny,small,base}[_window]
    frozen_stages: int = 0  # 1 = stem, 2 = stem and first stage, ...; R50 and larger use 1
    encoder_layers: int = 1  # attention within C5; more cost time and gave nothing (table 3)
    encoder_ffn: int = 1024  # 4 C
    # Channels of the hybrid encoder; 0: C. R101 has 384, and 256 after it.
    encoder_width: int = field(default=0, metadata=LATER)
    expansion: float = 0.5  # width of the fusion blocks; R18 0.5, R34 0.5, R50 and larger 1.0
    fusion_blocks: int = 3  # RepVGG blocks in each
    encoder_activation: Literal["gelu", "relu", "silu"] = "gelu"
    conv_activation: Literal["silu", "relu", "gelu"] = "silu"
    decoder_layers: int = 3  # R18 3, R34 4, R50 and larger 6
    decoder_ffn: int = 1024  # 4 C
    decoder_activation: Literal["relu", "gelu", "silu"] = "relu"
    queries: int = 300  # as many boxes as come out
    learned_content: bool = False  # queries start from learned vectors and not from their tokens (DINO)
    points: tuple[int, ...] = (4, 4, 4)  # samples per head in C3, C4, C5
    method: Literal["default", "discrete"] = "default"  # bilinear, or the nearest cell
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    dropout: float = 0.0  # none, as published
    denoising: bool = True  # class embedding for noised queries in training
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the published weights take pixels / 255
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.points) != 3:
            raise ModelError(f"model.points has {len(self.points)} numbers; expected one for each of C3, C4, C5")
        if self.encoder_width % self.heads or self.encoder_width % 4 or self.encoder_width < 0:
            raise ModelError(
                f"model.encoder_width is {self.encoder_width}; expected 0 (as model.hidden), or a "
                f"multiple of 4 and of {self.heads} heads"
            )
        if self.version == 1 and (len(set(self.points)) > 1 or self.method != "default"):
            raise ModelError("model.version 1 samples equally many points per level, bilinearly; use version 2")


def rt_detr(config: RtDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 4, with random weights."""
    c = config
    backbone, width = backbone_of(c, levels=(3, 4, 5)), c.encoder_width or c.hidden

    def encoder_layer() -> nn.Module:
        return EncoderLayer(
            MultiHeadAttention(width, c.heads, c.dropout),
            FeedForward(width, c.encoder_ffn, c.encoder_activation, c.dropout),
            width,
            c.dropout,
        )

    def decoder_layer() -> nn.Module:
        return DecoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout),
            DeformableCrossAttention(c.hidden, c.heads, c.points, c.sampling, c.method),
            FeedForward(c.hidden, c.decoder_ffn, c.decoder_activation, c.dropout),
            c.hidden,
            c.dropout,
        )

    encoder = HybridEncoder(
        backbone.channels,
        backbone.strides,
        width,
        [encoder_layer() for _ in range(c.encoder_layers)],
        c.expansion,
        c.fusion_blocks,
        c.conv_activation,
        c.hidden,
    )
    selector = TopKQueries(c.hidden, num_classes, c.queries, c.denoising, c.learned_content)
    decoder = Decoder(
        [decoder_layer() for _ in range(c.decoder_layers)],
        IterativeBoxes(c.hidden, num_classes, c.decoder_layers),
        query_position=Mlp(4, 2 * c.hidden, c.hidden, 2),
    )
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    reset_heads(detector)
    return detector


def reset_heads(detector: DetrModel) -> None:
    """Fresh class and box heads: every class rare, every box unmoved."""
    selector, heads = detector.selector, detector.decoder.boxes
    for score in [selector.score, *heads.score]:  # type: ignore[union-attr, misc]  # not known to mypy
        nn.init.xavier_uniform_(score.weight)  # type: ignore[union-attr, arg-type]  # not known to mypy
        nn.init.constant_(score.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[union-attr, arg-type]
    for box in [selector.box, *heads.box]:  # type: ignore[union-attr, misc]  # not known to mypy
        nn.init.zeros_(box.layers[-1].weight)  # type: ignore[union-attr, index, arg-type]  # not known to mypy
        nn.init.zeros_(box.layers[-1].bias)  # type: ignore[union-attr, index, arg-type]  # not known to mypy
