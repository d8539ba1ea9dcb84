"""RT-DETR: ResNet-vd, hybrid encoder, the best tokens as queries, deformable decoder.

Zhao et al. 2024, "DETRs Beat YOLOs on Real-time Object Detection"; version 2: Lv et al. 2024, "RT-DETRv2".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from edgedetr.errors import ModelError
from edgedetr.layers.feedforward import FeedForward, Mlp
from edgedetr.layers.norm import Normalize
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import IterativeBoxes
from edgedetr.models.checkpoints import author_names, hybrid_readers, transformers_keys, transformers_names
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, count_of
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass, three_levels
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, deformable_decoder_layers
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.hybrid import HybridEncoder, layers_of_coarsest, rt_detr_fusion
from edgedetr.models.initialization import HYBRID_INIT, two_stage_init, xavier_rule
from edgedetr.models.member import Member, PublishedResize, at
from edgedetr.models.member_config import WIDTHS, TransformerConfig, require_encoder_width
from edgedetr.models.queries.two_stage import TopKQueries
from edgedetr.options import LATER, Range


@dataclass(frozen=True)
class RtDetrConfig(TransformerConfig):
    """RT-DETR-R18 as published; the nano recipe narrows it."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "vfl"  # IoU-aware: a query's score predicts the IoU of its box (section 4.3)
    ranges: ClassVar[Mapping[str, Range]] = {
        "encoder_ffn": WIDTHS,
        "encoder_width": (0, 8192),
        "expansion": (0.05, 8),
        "fusion_blocks": (0, 100),
        "decoder_ffn": WIDTHS,
    }

    version: Literal[1, 2] = 2  # 2 allows `points` to differ per level, and method "discrete"
    backbone: str = "resnet18vd"  # resnet{18,34,50,101}[vd], hgnetv2_{atto,femto,pico,b0..b6},
    # vit_{tiny,small,base}[_window]
    frozen_stages: int = 0  # 1 = stem, 2 = stem and first stage, ...; R50 and larger use 1
    encoder_layers: int = 1  # attention within C5; more layers cost time without gain (table 3)
    encoder_ffn: int = 1024  # 4 C
    # Channels of the hybrid encoder; 0: as `hidden`. R101 has 384, and a hidden of 256.
    encoder_width: int = field(default=0, metadata=LATER)
    expansion: float = 0.5  # width of the fusion blocks; R18 0.5, R34 0.5, R50 and larger 1.0
    fusion_blocks: int = 3  # RepVGG blocks in each
    encoder_activation: Literal["gelu", "relu", "silu"] = "gelu"
    conv_activation: Literal["silu", "relu", "gelu"] = "silu"
    decoder_layers: int = 3  # R18 3, R34 4, R50 and larger 6
    decoder_ffn: int = 1024  # 4 C
    decoder_activation: Literal["relu", "gelu", "silu"] = "relu"
    # Between the Linears of box heads and query position (DEIM: silu).
    head_activation: Literal["relu", "silu"] = field(default="relu", metadata=LATER)
    # Linears of the query position: 2, the first to 2 C channels; or 3 of C channels (DEIM, `as_reg`).
    position_layers: Literal[2, 3] = field(default=2, metadata=LATER)
    queries: int = 300  # boxes per image
    learned_content: bool = False  # queries start from learned vectors and not from their tokens (DINO)
    points: tuple[int, ...] = (4, 4, 4)  # samples per head in C3, C4, C5
    method: Literal["default", "discrete"] = "default"  # bilinear, or the nearest cell
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    dropout: float = 0.0  # none, as published
    denoising: bool = True  # class embedding for noised queries in training
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the published weights expect pixels / 255
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.points) != 3:
            raise ModelError(f"model.points has {len(self.points)} numbers; expected one for each of C3, C4, C5")
        require_encoder_width(self.encoder_width, self.heads)
        if self.version == 1 and (len(set(self.points)) > 1 or self.method != "default"):
            raise ModelError("model.version 1 samples equally many points per level, bilinearly; use version 2")


def rt_detr(config: RtDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 4, with random weights."""
    c = config
    backbone, width = make_backbone(c, levels=(3, 4, 5)), c.encoder_width or c.hidden

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.decoder_ffn, c.decoder_activation, c.dropout)

    encoder = HybridEncoder(
        backbone.channels,
        backbone.strides,
        width,
        layers_of_coarsest(c.encoder_layers, width, c.heads, c.encoder_ffn, c.encoder_activation, c.dropout),
        rt_detr_fusion(width, c.expansion, c.fusion_blocks, c.conv_activation),
        c.hidden,
    )
    selector = TopKQueries(
        c.hidden, num_classes, c.queries, c.denoising, c.learned_content, activation=c.head_activation
    )
    layers = deformable_decoder_layers(
        c.decoder_layers, c.hidden, c.heads, c.points, feedforward, c.sampling, c.dropout, c.method
    )
    heads = IterativeBoxes(c.hidden, num_classes, c.decoder_layers, activation=c.head_activation)
    inside = 2 * c.hidden if c.position_layers == 2 else c.hidden
    position = Mlp(4, inside, c.hidden, c.position_layers, activation=c.head_activation)
    decoder = Decoder(layers, heads, query_position=position)
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    two_stage_init(selector, heads)
    return detector


def _expansion(state: StateDict) -> float | None:
    """Width of the fusion blocks, as a fraction of the encoder's."""
    inside, width = state.rows("encoder.top_down.0.deep.conv.weight"), state.rows("encoder.project.0.conv.weight")
    return inside / width if inside and width else None


def _points(state: StateDict) -> tuple[int, ...] | None:
    """Samples per head in C3, C4, C5, taken as equally many: the tensors show the sum alone."""
    total = state.rows("decoder.layers.0.cross_attention.weights.weight")
    return (total // (state.heads * 3),) * 3 if total else None


MEMBER = Member(
    name="rt_detr",
    config=RtDetrConfig,
    builder=rt_detr,
    paper="Zhao et al. 2024, arXiv:2304.08069; Lv et al. 2024, arXiv:2407.17140",
    published=(2023, 4),
    roles={**at("decoder.layers.*.cross_attention", DeformableCrossAttention), **at("selector", TopKQueries)},
    original_init=HYBRID_INIT | {"encoder.memory_project.*.conv.weight": xavier_rule},
    layouts=(
        Layout("transformers", r"^model\.enc_score_head\.", transformers_names.rt_detr),
        Layout("lyuwenyu/RT-DETR", r"^decoder\.enc_score_head\.", author_names.rt_detr),
    ),
    transformers={
        "rt_detr": TransformersClass(
            "RTDetrForObjectDetection", transformers_keys.RT_DETR, timm=False, levels=three_levels
        ),
        "rt_detr_v2": TransformersClass(
            "RTDetrV2ForObjectDetection", transformers_keys.RT_DETR_V2, timm=False, levels=three_levels
        ),
    },
    readers={
        **hybrid_readers.ENCODER,
        "encoder_width": hybrid_readers.encoder_width,
        **hybrid_readers.DECODER,
        "expansion": _expansion,
        "fusion_blocks": count_of(r"encoder\.top_down\.0\.blocks\.(\d+)\."),
        "position_layers": count_of(r"decoder\.query_position\.layers\.(\d+)\."),
        "points": _points,
    },
    unreadable=(
        "heads",
        "queries",
        "encoder_activation",
        "conv_activation",
        "decoder_activation",
        "head_activation",
        "method",
    ),
    resize=PublishedResize(square=640),
)
