"""Detectors on a windowed vision transformer (RF-DETR, LW-DETR): the backbone's configuration, and its builder."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgedetr.models.backbones.windowed_vit import WindowedVit, windowed_vit
from edgedetr.models.member_config import TransformerConfig
from edgedetr.options import LATER, Range, check

VIT_RANGES: dict[str, Range] = {
    "backbone_patch": (4, 64),
    "backbone_windows": (1, 32),
    "backbone_grid": (1, 512),
    **dict.fromkeys(("backbone_maps", "backbone_full_attention"), (0, 99)),
}


@dataclass(frozen=True)
class WindowedVitConfig(TransformerConfig):
    """A detector on a windowed vision transformer (models/backbones/windowed_vit.py); the numbers are RF-DETR nano's.

    `backbone_width` keeps the number of heads.
    """

    backbone: str = "dinov2_small"  # dinov2_{small,base}[_registers], lw_vit_{tiny,small,base}
    backbone_patch: int = field(default=16, metadata=LATER)  # pixels per side of a patch: the stride of the maps
    # Per side: a block attends within a window, here a quarter of the image, but for those of backbone_full_attention.
    backbone_windows: int = field(default=2, metadata=LATER)
    # Blocks, from 0, whose maps are read; there are none after the last.
    backbone_maps: tuple[int, ...] = field(default=(2, 5, 8, 11), metadata=LATER)
    backbone_full_attention: tuple[int, ...] = field(default=(3, 6, 9), metadata=LATER)  # blocks, from 0
    # Patches per side of the images that the positions are for (384 px); others interpolate.
    backbone_grid: int = field(default=24, metadata=LATER)
    frozen_stages: int = 0  # all of it learns

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "model", VIT_RANGES)

    @property
    def size_multiple(self) -> int:
        """Patch times windows: every window has the same number of patches."""
        return self.backbone_patch * self.backbone_windows


def make_windowed_backbone(config: WindowedVitConfig) -> WindowedVit:
    """The transformer that a configuration names, with random weights. Errors: ModelError, as `windowed_vit`."""
    c = config
    return windowed_vit(
        c.backbone,
        width=c.backbone_width,
        patch=c.backbone_patch,
        windows=c.backbone_windows,
        maps=c.backbone_maps,
        full_attention=c.backbone_full_attention,
        grid=c.backbone_grid,
        frozen_stages=c.frozen_stages,
        layer_scale=c.layer_scale,
    )
