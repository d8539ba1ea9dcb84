"""Detectors on a windowed vision transformer (RF-DETR, LW-DETR): the backbone's configuration, and its builder."""

from __future__ import annotations

from dataclasses import dataclass

from edgedetr.models.backbones.windowed_vit import WindowedVit, windowed_vit
from edgedetr.models.member_config import TransformerConfig
from edgedetr.options import Range, check

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
    backbone_patch: int = 16  # pixels per side of a patch, which is the stride of the maps
    backbone_windows: int = 2  # per side: blocks attend within a quarter of the image, but for those below
    backbone_maps: tuple[int, ...] = (2, 5, 8, 11)  # blocks, from 0, whose maps are read; after the last one: none
    backbone_full_attention: tuple[int, ...] = (3, 6, 9)  # blocks, from 0, that attend to the whole image
    backbone_grid: int = 24  # patches per side of the images that the positions are for (384 px); others interpolate
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
