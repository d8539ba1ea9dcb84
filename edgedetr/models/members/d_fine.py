"""D-FINE: HGNetV2, hybrid encoder, the best tokens as queries, and boxes whose sides are distributions.

Peng et al. 2024, "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.feedforward import FeedForward, Mlp
from edgedetr.layers.gate import Gate
from edgedetr.layers.norm import Normalize
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.checkpoints import author_names, hybrid_readers, transformers_keys, transformers_names
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, count_of, rows_of
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass, levels_of_encoder
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.distribution_boxes import DistributionBoxes
from edgedetr.models.encoders.hybrid import HybridEncoder, d_fine_fusion, layers_of_coarsest
from edgedetr.models.initialization import HYBRID_INIT, two_stage_init, xavier_rule
from edgedetr.models.member import Member, PublishedResize, at
from edgedetr.models.member_config import WIDTHS, TransformerConfig, require_encoder_width
from edgedetr.models.queries.two_stage import TopKQueries
from edgedetr.options import LATER, Range

FARTHEST_POSITION = 10.0  # bound of the query positions (the authors' decoder)


@dataclass(frozen=True)
class DFineConfig(TransformerConfig):
    """D-FINE-L as published (the authors' configs/dfine); the recipes of the other sizes say what differs."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "vfl"  # IoU-aware, as RT-DETR
    has_sides: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "levels": (2, 3),
        "encoder_ffn": WIDTHS,
        "encoder_width": (0, 8192),
        "expansion": (0.05, 8),
        "fusion_blocks": (0, 100),
        "decoder_ffn": WIDTHS,
        "reg_max": (4, 1024),
        "reg_scale": (0.01, 1000),
        "reg_up": (0.01, 100),
    }

    backbone: str = "hgnetv2_b4"  # N and S b0, M b2, L b4, X b5
    frozen_stages: int = 1  # the stem, in L and X; N, S and M 0
    levels: int = 3  # C3, C4, C5; N 2: C4, C5
    encoder_layers: int = 1  # attention within C5
    encoder_ffn: int = 1024  # 4 C; N 512, X 2048
    encoder_width: int = field(default=0, metadata=LATER)  # channels of the hybrid encoder; 0: as `hidden`; X 384
    expansion: float = 1.0  # width inside the fusion blocks; N 0.34, S 0.5
    fusion_blocks: int = 3  # RepVGG blocks in each half of them: three times the authors' depth_mult; N and M 2, S 1
    encoder_activation: Literal["gelu", "relu", "silu"] = "gelu"
    conv_activation: Literal["silu", "relu", "gelu"] = "silu"
    decoder_layers: int = 6  # N and S 3, M 4
    decoder_ffn: int = 1024  # 4 C; N 512
    decoder_activation: Literal["relu", "gelu", "silu"] = "relu"  # DEIM: silu
    # Between the Linears of box heads and query position (DEIM: silu).
    head_activation: Literal["relu", "silu"] = field(default="relu", metadata=LATER)
    queries: int = 300  # boxes per image
    learned_content: bool = False  # queries start from learned vectors and not from their tokens (DINO)
    points: tuple[int, ...] = (3, 6, 3)  # samples per head in C3, C4, C5; N 6 in C4 and C5
    method: Literal["default", "discrete"] = "default"  # bilinear, or the nearest cell
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    reg_max: int = field(default=32, metadata=LATER)  # bins of a side's distribution, less one; even (section 4.1)
    # Larger: bins closer to the middle, and steps more different; X 8.
    reg_scale: float = field(default=4.0, metadata=LATER)
    reg_up: float = field(
        default=0.5, metadata=LATER
    )  # the finer bins reach so many box sides; the outermost two twice as far
    dropout: float = 0.0  # none, as published
    denoising: bool = True  # class embedding for noised queries in training
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the published weights expect pixels / 255
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_points_and_bins(self.points, self.levels, self.reg_max)
        require_encoder_width(self.encoder_width, self.heads)


def require_points_and_bins(points: tuple[int, ...], levels: int, reg_max: int) -> None:
    """Errors: ModelError for another number of `points` than levels, or a number of bins without a middle."""
    if len(points) != levels:
        raise ModelError(f"model.points has {len(points)} numbers; expected one for each of the {levels} levels")
    if reg_max % 2:
        raise ModelError(f"model.reg_max is {reg_max}; expected an even number, so that a bin means no step")


def d_fine(config: DFineConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 2, with random weights."""
    c = config
    backbone, width = make_backbone(c, levels=(3, 4, 5)[-c.levels :]), c.encoder_width or c.hidden

    def decoder_layer() -> nn.Module:
        return DecoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout),
            DeformableCrossAttention(c.hidden, c.heads, c.points, c.sampling, c.method, project=False),
            FeedForward(c.hidden, c.decoder_ffn, c.decoder_activation, c.dropout),
            c.hidden,
            c.dropout,
            gate=Gate(c.hidden),
        )

    encoder = HybridEncoder(
        backbone.channels,
        backbone.strides,
        width,
        layers_of_coarsest(c.encoder_layers, width, c.heads, c.encoder_ffn, c.encoder_activation, c.dropout),
        d_fine_fusion(width, c.expansion, c.fusion_blocks, c.conv_activation),
        None if width == c.hidden else c.hidden,
    )
    selector = TopKQueries(
        c.hidden, num_classes, c.queries, c.denoising, c.learned_content, activation=c.head_activation
    )
    layers = [decoder_layer() for _ in range(c.decoder_layers)]
    heads = DistributionBoxes(
        c.hidden, num_classes, c.decoder_layers, c.reg_max, c.reg_up, c.reg_scale, c.head_activation
    )
    position = Mlp(4, 2 * c.hidden, c.hidden, 2, limit=FARTHEST_POSITION, activation=c.head_activation)
    detector = DetrModel(
        backbone, encoder, selector, Decoder(layers, heads, query_position=position), Normalize(c.mean, c.std)
    )
    two_stage_init(selector, heads)
    return detector


_levels = count_of(r"encoder\.project\.(\d)\.")


def _expansion(state: StateDict) -> float | None:
    """Width inside the fusion blocks, twice as a fraction of the encoder's."""
    width = state.rows("encoder.project.0.conv.weight")
    inside = state.rows("encoder.top_down.0.first.0.deep.conv.weight")
    return 2 * inside / width if inside and width else None


def points_of(state: StateDict, levels: int | None) -> tuple[int, ...] | None:
    """Samples per head in each level: the tensors show the sum alone, which is split as published."""
    total = state.rows("decoder.layers.0.cross_attention.weights.weight")
    if not total or not levels:
        return None
    if (total, levels) == (12 * state.heads, 3):
        return DFineConfig.points
    each, left = divmod(total // state.heads, levels)
    return tuple(each + (level < left) for level in range(levels))


MEMBER = Member(
    name="d_fine",
    config=DFineConfig,
    builder=d_fine,
    paper="Peng et al. 2024, arXiv:2410.13842",
    published=(2024, 10),
    roles={
        **at("decoder.layers.*.cross_attention", DeformableCrossAttention),
        **at("decoder.boxes", DistributionBoxes),
        **at("selector", TopKQueries),
    },
    original_init=HYBRID_INIT | {"encoder.memory_project.*.conv.weight": xavier_rule},
    layouts=(
        Layout("transformers", r"^model\.decoder\.pre_bbox_head\.", transformers_names.d_fine),
        Layout("Peterande/D-FINE", r"^decoder\.pre_bbox_head\.", author_names.d_fine),
    ),
    transformers={
        "d_fine": TransformersClass(
            "DFineForObjectDetection", transformers_keys.D_FINE, timm=False, levels=levels_of_encoder
        )
    },
    readers={
        "hidden": rows_of(hybrid_readers.NORM),
        "levels": _levels,
        **hybrid_readers.ENCODER,
        "encoder_width": hybrid_readers.encoder_width,
        **hybrid_readers.DECODER,
        **hybrid_readers.SIDES,
        "expansion": _expansion,
        "fusion_blocks": count_of(r"encoder\.top_down\.0\.first\.0\.blocks\.(\d+)\."),
        "points": lambda state: points_of(state, _levels(state)),
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
