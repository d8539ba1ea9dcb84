"""DEIMv2: D-FINE's boxes with a lighter decoder, from half a million parameters on HGNetV2 to DINOv3's transformers.

Huang et al. 2025, "Real-Time Object Detection Meets DINOv3"; the network is that of the authors' code
(Intellindust-AI-Lab/DEIMv2, engine/deim), with which their weights were trained. transformers' class computes another
one: see `as_transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.feedforward import GatedFeedForward, Mlp
from edgedetr.layers.gate import Gate
from edgedetr.layers.norm import Normalize, RmsNorm
from edgedetr.models.backbones import dinov3
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.checkpoints import author_names, hybrid_readers, transformers_keys, transformers_names
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, count_of, has, rows_of
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass, levels_of_deimv2
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.distribution_boxes import DistributionBoxes
from edgedetr.models.encoders.hybrid import HybridEncoder, d_fine_fusion, elan_width, layers_of_coarsest
from edgedetr.models.encoders.lite import LiteEncoder
from edgedetr.models.initialization import HYBRID_INIT, two_stage_init
from edgedetr.models.member import Member, PublishedResize, at
from edgedetr.models.member_config import WIDTHS, TransformerConfig
from edgedetr.models.members.d_fine import FARTHEST_POSITION, points_of, require_points_and_bins
from edgedetr.models.queries.two_stage import TopKQueries
from edgedetr.options import LATER, Range


@dataclass(frozen=True)
class Deimv2Config(TransformerConfig):
    """DEIMv2-N as published (the authors' configs/deimv2); the recipes of the other sizes say what differs."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "mal"  # DEIM's
    has_sides: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "levels": (2, 3),
        "encoder_ffn": WIDTHS,
        "expansion": (0.05, 8),
        "fusion_blocks": (0, 100),
        "decoder_ffn": (2, 32768),
        "reg_max": (4, 1024),
        "reg_scale": (0.01, 1000),
        "reg_up": (0.01, 100),
    }

    backbone: str = "hgnetv2_b0"  # Atto hgnetv2_atto, Femto, Pico; S dinov3_tiny, M tiny_plus, L small, X small_plus
    frozen_stages: int = 0
    # Atto, Femto, Pico: the lite encoder, of C4 and a coarser map made from it.
    lite: bool = field(default=False, metadata=LATER)
    levels: int = 2  # C4, C5; S to X 3: C3, C4, C5
    encoder_layers: int = 1  # attention within C5; none in the lite encoder
    encoder_ffn: int = 512  # 4 C
    expansion: float = 0.34  # width inside the fusion blocks; M 0.67, L 1, X 1.25
    fusion_blocks: int = 2  # RepVGG blocks in each half of them: three times the authors' depth_mult; M and L 3, X 4
    smooth: bool = field(default=True, metadata=LATER)  # a 3x3 convolution in each half of them; S to X none
    encoder_activation: Literal["gelu", "relu", "silu"] = "gelu"
    conv_activation: Literal["silu", "relu", "gelu"] = "silu"
    hidden: int = 128
    decoder_layers: int = 3  # S, M, L 4, X 6
    decoder_ffn: int = 512  # of which half is the gate (SwiGLU)
    # Joins queries with what they read; Atto, Femto, Pico: a sum and its norm.
    gate: bool = field(default=True, metadata=LATER)
    shared_boxes: bool = field(default=False, metadata=LATER)  # one head of the sides for all layers; Atto, Femto, Pico
    # Between the Linears of the queries' position.
    position_activation: Literal["silu", "relu"] = field(default="silu", metadata=LATER)
    queries: int = 300  # boxes per image; Atto 100, Femto 150, Pico 200
    learned_content: bool = False  # queries start from learned vectors and not from their tokens (DINO)
    points: tuple[int, ...] = (6, 6)  # samples per head in each level; lite (4, 2), S to X (3, 6, 3)
    method: Literal["default", "discrete"] = "default"  # bilinear, or the nearest cell
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    reg_max: int = field(default=32, metadata=LATER)  # bins of a side's distribution, less one; even
    reg_scale: float = field(default=4.0, metadata=LATER)  # larger: bins closer to the middle
    reg_up: float = field(default=0.5, metadata=LATER)  # the finer bins reach so many box sides
    # Compute what transformers' class does and the authors' code does not: tokens are projected and normalized before
    # they are scored, positions follow the boxes from layer to layer, and heads have ReLU where theirs have SiLU.
    as_transformers: bool = field(default=False, metadata=LATER)
    dropout: float = 0.0  # none, as published
    denoising: bool = True  # class embedding for noised queries in training
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # S to X: ImageNet's
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lite and self.levels != 2:
            raise ModelError(f"model.levels is {self.levels}; the lite encoder (model.lite) makes 2")
        require_points_and_bins(self.points, self.levels, self.reg_max)


def deimv2(config: Deimv2Config, num_classes: int) -> DetrModel:
    """The network of the paper's figure 2, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(4,) if c.lite else (3, 4, 5)[-c.levels :])
    of_heads = "relu" if c.as_transformers else "silu"

    def decoder_layer() -> nn.Module:
        return DecoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout),
            DeformableCrossAttention(c.hidden, c.heads, c.points, c.sampling, c.method, project=False),
            GatedFeedForward(c.hidden, c.decoder_ffn // 2),
            c.hidden,
            c.dropout,
            gate=Gate(c.hidden, RmsNorm) if c.gate else None,
            norm=RmsNorm,
        )

    if c.lite:
        encoder: nn.Module = LiteEncoder(
            backbone.channels[0], backbone.strides[0], c.hidden, c.expansion, c.fusion_blocks, c.conv_activation
        )
    else:
        encoder = HybridEncoder(
            backbone.channels,
            backbone.strides,
            c.hidden,
            layers_of_coarsest(c.encoder_layers, c.hidden, c.heads, c.encoder_ffn, c.encoder_activation, c.dropout),
            d_fine_fusion(c.hidden, c.expansion, c.fusion_blocks, c.conv_activation, summed=True, smooth=c.smooth),
            None,
            project=c.backbone not in dinov3.NAMES,  # whose maps have the encoder's channels
        )
    selector = TopKQueries(
        c.hidden, num_classes, c.queries, c.denoising, c.learned_content, c.as_transformers, of_heads
    )
    layers = [decoder_layer() for _ in range(c.decoder_layers)]
    heads = DistributionBoxes(
        c.hidden, num_classes, c.decoder_layers, c.reg_max, c.reg_up, c.reg_scale, of_heads, c.shared_boxes
    )
    position = Mlp(4, c.hidden, c.hidden, 3, FARTHEST_POSITION, c.position_activation)
    decoder = Decoder(layers, heads, query_position=position, position_once=not c.as_transformers)
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    two_stage_init(selector, heads)
    return detector


BLOCK = r"encoder\.top_down(?:\.0)?"  # the first fusion block: of a list, or the lite encoder's only one


def _lite(state: StateDict) -> bool:
    return state.has("encoder.mix.conv.weight")


def _levels(state: StateDict) -> int | None:
    blocks = state.count(r"encoder\.bottom_up\.(\d)\.")
    return 2 if _lite(state) else None if blocks is None else blocks + 1


def _encoder_layers(state: StateDict) -> int | None:
    return 0 if _lite(state) else state.count(r"encoder\.attention\.(\d+)\.")


def _expansion(state: StateDict) -> float | None:
    """Width inside the fusion blocks, twice as a fraction of C."""
    inside = state.rows(*(f"encoder.top_down{number}.first.0.deep.conv.weight" for number in (".0", "")))
    width = state.rows(hybrid_readers.NORM)
    if not inside or not width:
        return None
    exact = 2 * inside / width
    return exact if elan_width(width, exact) == inside else (2 * inside + 0.5) / width  # which rounds down to it


def _decoder_ffn(state: StateDict) -> int | None:
    half = state.rows("decoder.layers.0.feedforward.up.weight")
    return None if half is None else 2 * half


def _shared_boxes(state: StateDict) -> bool:
    heads, layers = (state.count(rf"decoder\.boxes\.{part}\.(\d+)\.") for part in ("box", "score"))
    return heads == 1 and layers != 1


def _points(state: StateDict) -> tuple[int, ...] | None:
    """Samples per head in each level: the tensors show the sum alone, which is split as published."""
    total = state.rows("decoder.layers.0.cross_attention.weights.weight")
    return (4, 2) if total == 6 * state.heads and _lite(state) else points_of(state, _levels(state))


MEMBER = Member(
    name="deimv2",
    config=Deimv2Config,
    builder=deimv2,
    paper="Huang et al. 2025, arXiv:2509.20787",
    published=(2025, 9),
    roles={
        **at("decoder.layers.*.cross_attention", DeformableCrossAttention),
        **at("decoder.boxes", DistributionBoxes),
        **at("selector", TopKQueries),
    },
    original_init=HYBRID_INIT,
    layouts=(
        Layout("transformers", r"^model\.decoder\.layers\.0\.mlp\.gate_proj\.", transformers_names.deimv2),
        Layout("Intellindust-AI-Lab/DEIMv2", r"^decoder\.decoder\.layers\.0\.swish_ffn\.", author_names.deimv2),
    ),
    transformers={
        "deimv2": TransformersClass(
            "Deimv2ForObjectDetection", transformers_keys.DEIMV2, timm=False, levels=levels_of_deimv2
        )
    },
    readers={
        "hidden": rows_of(hybrid_readers.NORM),
        "lite": _lite,
        "levels": _levels,
        **hybrid_readers.ENCODER,
        "encoder_layers": _encoder_layers,
        "expansion": _expansion,
        "fusion_blocks": count_of(rf"{BLOCK}\.first\.0\.blocks\.(\d+)\."),
        "smooth": lambda state: state.count(rf"{BLOCK}\.first\.(1)\.") is not None,
        **hybrid_readers.DECODER,
        "decoder_ffn": _decoder_ffn,
        "gate": has("decoder.layers.0.gate.weights.weight"),
        "shared_boxes": _shared_boxes,
        "points": _points,
        **hybrid_readers.SIDES,
        "as_transformers": has("selector.project.weight"),
    },
    unreadable=("heads", "queries", "encoder_activation", "conv_activation", "position_activation", "method"),
    resize=PublishedResize(square=640),
)
