"""LW-DETR: a windowed ViT, a projector in place of an encoder, and groups of queries in training.

Chen et al. 2024, "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection". RF-DETR is built by it as well.
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
from edgedetr.models.backbones.windowed_vit import WindowedVit
from edgedetr.models.box_heads import ExpDeltaBoxes
from edgedetr.models.checkpoints import group_detr_names, transformers_keys
from edgedetr.models.checkpoints.config_from_state_dict import Reader, StateDict, rows_of
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.decoder import Decoder, DecoderLayer
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.projector import ProjectorEncoder
from edgedetr.models.initialization import InitRule, packed_qkv, prior_bias_init, xavier_rule, zero_box_init
from edgedetr.models.member import PER_CLASS, Member, PublishedResize, Role, at
from edgedetr.models.queries.group import GroupQueries
from edgedetr.models.windowed_backbone import WindowedVitConfig, make_windowed_backbone
from edgedetr.options import LATER, Range

HEAD = 32  # channels of each head of self-attention, twice those of cross-attention, in every published size


@dataclass(frozen=True)
class LwDetrConfig(WindowedVitConfig):
    """LW-DETR small as published (its table 1, and scripts/lwdetr_small_coco_train.sh)."""

    activation: ClassVar[str] = "sigmoid"  # of the class logits
    class_loss: ClassVar[str] = "ia_bce"  # a query's score learns p^0.25 IoU^0.75 (section 3.3)
    projector_norm: ClassVar[str] = "batch"  # of the projector's convolutions
    ranges: ClassVar[Mapping[str, Range]] = {"scales": (0.5, 2), "cross_heads": (1, 256), "groups": (1, 100)}

    backbone: str = "lw_vit_tiny"  # T and S; small: M and L; base: X; or dinov2_{small,base}[_registers]
    backbone_windows: int = field(default=4, metadata=LATER)  # per side
    backbone_maps: tuple[int, ...] = field(default=(2, 4, 5, 9), metadata=LATER)  # T: 1, 3, 5
    backbone_full_attention: tuple[int, ...] = field(default=(2, 4, 5, 8), metadata=LATER)  # T: 1, 3, 5
    backbone_grid: int = field(default=14, metadata=LATER)  # of 224 px, in pretraining
    # Of each level to the maps: P4 alone; L and X have P3 and P5, [2, 0.5].
    scales: tuple[float, ...] = field(default=(1.0,), metadata=LATER)
    decoder_layers: int = 3
    cross_heads: int = field(default=16, metadata=LATER)  # of deformable attention; twice `heads`
    points: int = 2  # samples per head and level; L and X: 4
    ffn: int = 2048  # 8 C
    queries: int = 300  # boxes per image; T: 100
    # Of queries in training, each with its own two-stage head; one is deployed.
    groups: int = field(default=13, metadata=LATER)
    sampling: Literal["auto", "gather", "grid_sample"] = (
        "auto"  # in training: the faster one; export has its own choice
    )
    dropout: float = 0.0  # none, as published

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.cross_heads:
            raise ModelError(
                f"model.hidden is {self.hidden}; expected a multiple of {self.cross_heads} model.cross_heads"
            )
        if not self.scales or any(scale not in (2, 1, 0.5) for scale in self.scales):
            raise ModelError(f"model.scales is {list(self.scales)}; expected numbers of 2, 1 and 0.5, one per level")


def lw_detr(config: LwDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 4, with random weights."""
    c = config
    backbone = make_windowed_backbone(c)

    def decoder_layer() -> nn.Module:
        return DecoderLayer(
            MultiHeadAttention(c.hidden, c.heads, c.dropout),
            DeformableCrossAttention(c.hidden, c.cross_heads, (c.points,) * len(c.scales), c.sampling),
            FeedForward(c.hidden, c.ffn, "relu", c.dropout, c.dropout),
            c.hidden,
            c.dropout,
        )

    encoder = ProjectorEncoder(backbone.channels, backbone.strides, c.scales, c.hidden, c.projector_norm)
    selector = GroupQueries(c.hidden, num_classes, c.queries, c.groups)
    heads = ExpDeltaBoxes(c.hidden, num_classes)
    decoder = Decoder([decoder_layer() for _ in range(c.decoder_layers)], heads, norm=nn.LayerNorm(c.hidden))
    detector = DetrModel(backbone, encoder, selector, decoder, Normalize(c.mean, c.std))
    prior_bias_init(selector, *selector.others, heads)
    zero_box_init(selector, *selector.others, heads)
    return detector


def _heads(name: str, channels: int) -> Callable[[StateDict], int]:
    """Heads of so many channels, unless a file tells another number."""

    def reader(state: StateDict) -> int:
        return state.known.get(name) or max((state.rows("decoder.norm.weight") or channels) // channels, 1)

    return reader


_cross_heads = _heads("cross_heads", HEAD // 2)


def _scales(state: StateDict) -> tuple[float, ...] | None:
    """Of each level: enlarging is a transposed convolution, halving a convolution; at the maps' size is none."""
    levels = state.count(r"encoder\.project\.fuse\.(\d+)\.") or 0

    def scale(level: int) -> float:
        first = f"encoder.project.sampling.{level}.0"
        if state.has(f"{first}.0.weight") or state.has(f"{first}.1.weight"):
            return 2.0
        return 0.5 if state.has(f"{first}.0.conv.weight") else 1.0

    return tuple(scale(level) for level in range(levels)) or None


def _points(state: StateDict) -> int | None:
    """Samples per head and level, as many in every level."""
    total = state.rows("decoder.layers.0.cross_attention.weights.weight")
    return total // (_cross_heads(state) * len(_scales(state) or (1,))) if total else None


def _blocks(state: StateDict) -> int:
    return state.count(r"backbone\.blocks\.(\d+)\.") or 0


# No tensor shows these; the published sizes differ in them by their number of blocks.
TINY_BLOCKS = 6
# Of RF-DETR as well.
GROUP_READERS: dict[str, Reader] = {
    "heads": _heads("heads", HEAD),
    "cross_heads": _cross_heads,
    "scales": _scales,
    "points": _points,
    "queries": rows_of("selector.content.weight"),
    "groups": lambda state: 1 + (state.count(r"selector\.others\.(\d+)\.") or 0),
}
GROUP_ROLES: dict[str, Role] = {
    **at("backbone", WindowedVit),
    **at("encoder", ProjectorEncoder),
    **at("decoder.layers.*.cross_attention", DeformableCrossAttention),
    **at("selector", GroupQueries),
}
GROUP_PER_CLASS = (*PER_CLASS, "selector.others.*.score.*")
GROUP_INIT: dict[str, InitRule] = packed_qkv("decoder.layers.*.self_attention") | {
    "decoder.layers.*.feedforward.*.weight": xavier_rule,
    "selector.place.*.weight": xavier_rule,
}
UNREADABLE = ("heads", "cross_heads", "backbone_windows", "backbone_maps", "backbone_full_attention")

MEMBER = Member(
    name="lw_detr",
    config=LwDetrConfig,
    builder=lw_detr,
    paper="Chen et al. 2024, arXiv:2406.03459",
    published=(2024, 6),
    roles=GROUP_ROLES,
    per_class=GROUP_PER_CLASS,
    original_init=GROUP_INIT,
    layouts=(
        Layout("transformers", r"^model\.backbone\.projector\.scale_layers\.", group_detr_names.transformers),
        Layout("Atten4Vis/LW-DETR", r"^backbone\.0\.encoder\.blocks\.", group_detr_names.lw_detr),
    ),
    transformers={
        "lw_detr": TransformersClass(
            "LwDetrForObjectDetection", transformers_keys.LW_DETR, timm=False, windowed_vit="lw_detr_vit"
        )
    },
    readers={
        **GROUP_READERS,
        "backbone_maps": lambda state: (1, 3, 5) if _blocks(state) == TINY_BLOCKS else None,
        "backbone_full_attention": lambda state: (1, 3, 5) if _blocks(state) == TINY_BLOCKS else None,
    },
    unreadable=UNREADABLE,
    resize=PublishedResize(square=640),
)
