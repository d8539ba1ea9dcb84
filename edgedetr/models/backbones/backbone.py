"""Builds a backbone from its configuration: a ResNet, an HGNetV2 or a vision transformer, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from edgedetr.errors import ModelError, did_you_mean
from edgedetr.models.backbones import dinov3, hgnetv2, resnet, vit
from edgedetr.models.backbones.vit_designs import DESIGNS
from edgedetr.options import LATER

NAMES = (*resnet.NAMES, *hgnetv2.NAMES, *vit.NAMES, *dinov3.NAMES)
SIZE_MULTIPLE = 32  # pixels: the stride of C5, so that every level of a pyramid is twice as large as the next


@dataclass(frozen=True)
class BackboneConfig:
    """The backbone part of every member's configuration."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    backbone: str = "resnet50"  # resnet{18,34,50,101}[vd], hgnetv2_{atto,femto,pico,b0..b6},
    # vit_{tiny,small,base}[_window], dinov3_{tiny,small}[_plus]
    backbone_width: float = 1.0  # 0.5 halves every channel count: for small data and CPUs
    backbone_weights: str = "auto"  # "auto", "random", a hub name, or a .safetensors file
    backbone_norm: Literal["frozen", "trainable"] = "frozen"  # trainable where weights are random
    layer_scale: float = field(default=0.0, metadata=LATER)  # a ViT's LayerScale: start of its factors (CaiT:
    # 1e-5); also for weights that have them (DINOv2); 0 = none
    frozen_stages: int = 2  # stem and first stage keep their ImageNet weights
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet, as torchvision's weights were trained
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def size_multiple(self) -> int:
        """What both sides of the input are multiples of, in pixels."""
        return SIZE_MULTIPLE


def make_backbone(
    config: BackboneConfig, levels: Sequence[int], dilate_last: bool = False
) -> resnet.ResNet | hgnetv2.HgNetV2 | vit.VitPyramid | dinov3.SpatialTuning:
    """The backbone that a configuration names, with random weights.

    levels       stages to return, 2..5, which is strides 4..32
    dilate_last  C5 of a ResNet at stride 16 (DC5)
    """
    name, width = config.backbone, config.backbone_width
    if name in DESIGNS:
        raise ModelError(
            f"model.backbone {name} has the maps of several blocks at one stride, which rf_detr and lw_detr read; "
            f"expected one of {', '.join(NAMES)}"
        )
    if name not in NAMES:
        raise ModelError(f"model.backbone is {name!r}; expected one of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    if name not in (*vit.NAMES, *dinov3.NAMES) and config.layer_scale:
        raise ModelError(f"model.layer_scale belongs to vision transformers, not to {name}; expected 0")
    if name in resnet.NAMES:
        return resnet.resnet(
            name,
            levels,
            width=width,
            frozen_norm=config.backbone_norm == "frozen",
            frozen_stages=config.frozen_stages,
            dilate_last=dilate_last,
        )
    if dilate_last:
        raise ModelError(f"model.dilate_last needs a bottleneck ResNet, not {name}; use resnet50 or resnet101")
    if name in hgnetv2.NAMES:
        frozen_norm = config.backbone_norm == "frozen"
        return hgnetv2.hgnetv2(name, levels, width=width, frozen_norm=frozen_norm, frozen_stages=config.frozen_stages)
    build = dinov3.dinov3 if name in dinov3.NAMES else vit.vit
    return build(name, levels, width=width, frozen_stages=config.frozen_stages, layer_scale=config.layer_scale)
