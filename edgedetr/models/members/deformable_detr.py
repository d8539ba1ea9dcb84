"""Deformable DETR: attention samples a few points, which makes several feature levels affordable.

Zhu et al. 2021, "Deformable DETR: Deformable Transformers for End-to-End Object Detection".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from edgedetr.errors import ModelError
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.norm import Normalize
from edgedetr.models.backbones.backbone import make_backbone
from edgedetr.models.box_heads import AbsoluteBoxes, IterativeBoxes
from edgedetr.models.checkpoints import author_names, transformers_keys, transformers_names
from edgedetr.models.checkpoints.config_from_state_dict import Reader, StateDict, has, rows_of
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, deformable_decoder_layers
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.deformable import DeformableEncoder, DeformableLayer, deformable_encoder_layers
from edgedetr.models.initialization import box_size_init, packed_qkv, prior_bias_init, xavier_rule, zero_box_init
from edgedetr.models.member import Member, at
from edgedetr.models.member_config import TransformerConfig
from edgedetr.models.queries.learned import PointQueries
from edgedetr.models.queries.two_stage import ProposalQueries
from edgedetr.options import LATER

SIZE_LOGIT = -2.0  # width and height that every box starts from: 0.12 of the image


@dataclass(frozen=True)
class DeformableDetrConfig(TransformerConfig):
    """Deformable DETR-R50 as published, multi-scale; `refine` and `two_stage` are its stronger forms (table 1)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "focal"

    dilate_last: bool = False  # C5 at stride 16 (DC5), for a single level
    levels: int = 4  # C3, C4, C5 and a stride-2 convolution of C5; 1: C5 alone
    points: int = 4  # samples per head and level
    ffn: int = 1024  # 4 C
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 300  # boxes per image
    refine: bool = False  # every layer moves the box of the layer before, with its own heads
    two_stage: bool = False  # queries start at the best boxes that a head proposes in the memory
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    dropout: float = 0.1
    denoising: bool = False  # vectors for noised labels, for two_stage; not in the paper
    ffn_activation: Literal["relu", "gelu", "silu"] = "relu"
    # A layer's loss also trains the box of the layer before; for refine (Zhang et al. 2022, "DINO", section 3.5).
    look_forward_twice: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and not self.refine:
            raise ModelError("model.two_stage refines the boxes it starts from; add --set model.refine=true")
        if self.look_forward_twice and not self.refine:
            raise ModelError("model.look_forward_twice needs boxes that every layer moves; add --set model.refine=true")
        if self.denoising and not self.two_stage:
            raise ModelError("model.denoising needs queries that start from boxes; add --set model.two_stage=true")
        if self.levels not in (1, 3, 4, 5) or self.points < 1:
            raise ModelError(
                f"model.levels is {self.levels}, model.points {self.points}; expected "
                "1 (C5), 3 (C3 to C5), 4 or 5 levels, and at least 1 point"
            )


def deformable_detr(config: DeformableDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 1, with random weights."""
    c = config
    backbone = make_backbone(c, levels=(5,) if c.levels == 1 else (3, 4, 5), dilate_last=c.dilate_last)
    points = (c.points,) * c.levels

    def feedforward() -> FeedForward:
        return FeedForward(c.hidden, c.ffn, c.ffn_activation, c.dropout, c.dropout)

    encoder_layers = deformable_encoder_layers(
        c.encoder_layers, c.hidden, c.heads, points, feedforward, c.sampling, c.dropout
    )
    encoder = DeformableEncoder(backbone.channels, backbone.strides, c.hidden, c.levels, encoder_layers)
    selector = (
        ProposalQueries(c.hidden, num_classes, c.queries, c.denoising)
        if c.two_stage
        else PointQueries(c.queries, c.hidden)
    )
    heads = (
        IterativeBoxes(c.hidden, num_classes, c.decoder_layers, c.look_forward_twice)
        if c.refine
        else AbsoluteBoxes(c.hidden, num_classes)
    )
    decoder_layers = deformable_decoder_layers(
        c.decoder_layers, c.hidden, c.heads, points, feedforward, c.sampling, c.dropout
    )
    decoder = Decoder(decoder_layers, heads)
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    prior_bias_init(selector, heads)
    zero_box_init(selector, heads)
    if not c.two_stage:
        box_size_init(heads, SIZE_LOGIT)
    return detector


def _points(state: StateDict) -> int | None:
    """Samples per head and level, equally many in every level."""
    total, levels = state.rows("decoder.layers.0.cross_attention.weights.weight"), state.rows("encoder.place.level")
    return total // (state.heads * levels) if total and levels else None


# Read from the sizes of the tensors; Efficient DETR has the same encoder and attention.
SAMPLING_READERS: dict[str, Reader] = {"levels": rows_of("encoder.place.level"), "points": _points}


def _refuse_import(values: Mapping[str, Any]) -> str:
    """Why a model with few channels is not imported: our GroupNorm has at least two channels per group."""
    hidden = values.get("hidden", 64)
    if hidden >= 64:
        return ""
    return (
        f"{hidden} channels per token (d_model), which theirs normalizes one by one in 32 groups and ours in pairs; "
        "expected at least 64"
    )


MEMBER = Member(
    name="deformable_detr",
    config=DeformableDetrConfig,
    builder=deformable_detr,
    paper="Zhu et al. 2021, arXiv:2010.04159",
    published=(2020, 10),
    roles={
        **at("encoder.layers.*", DeformableLayer),
        **at("decoder.layers.*.cross_attention", DeformableCrossAttention),
        **at("selector", ProposalQueries),
    },
    slow_parameters=("*.offsets.*", "selector.reference.*"),  # a tenth of the rate (section A.4)
    original_init=packed_qkv("decoder.layers.*.self_attention") | {"*.feedforward.*.weight": xavier_rule},
    layouts=(
        Layout("transformers", r"^model\.level_embed$", transformers_names.deformable_detr),
        Layout("fundamentalvision/Deformable-DETR", r"^transformer\.level_embed$", author_names.deformable_detr),
    ),
    transformers={
        "deformable_detr": TransformersClass(
            "DeformableDetrForObjectDetection",
            transformers_keys.DEFORMABLE,
            levels=lambda raw: [4] if raw.get("num_feature_levels", 4) == 1 else [2, 3, 4],
            queries_key=lambda raw: "two_stage_num_proposals" if raw.get("two_stage") is True else "num_queries",
        )
    },
    readers={
        **SAMPLING_READERS,
        "queries": rows_of("selector.embed.weight"),
        "refine": has("decoder.boxes.box.0.layers.0.weight"),
        "two_stage": has("selector.place.weight"),
    },
    unreadable=("heads", "queries", "dilate_last", "ffn_activation"),
    refuse_import=_refuse_import,
)
