"""RF-DETR: LW-DETR on DINOv2, with LayerNorm in the projector; nano, small, medium and large.

Robinson et al. 2025, "RF-DETR: Neural Architecture Search for Real-Time Detection Transformers". Its XL and 2XL have
another licence than these four (PML 1.0), and are no recipes here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from edgedetr.models.checkpoints import group_detr_names, transformers_keys
from edgedetr.models.checkpoints.config_from_state_dict import StateDict
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass
from edgedetr.models.detector import DetrModel
from edgedetr.models.member import Member, PublishedResize
from edgedetr.models.members.lw_detr import (
    GROUP_INIT,
    GROUP_PER_CLASS,
    GROUP_READERS,
    GROUP_ROLES,
    UNREADABLE,
    LwDetrConfig,
    lw_detr,
)
from edgedetr.options import LATER


@dataclass(frozen=True)
class RfDetrConfig(LwDetrConfig):
    """RF-DETR nano as published (rfdetr/config.py); small has 3 decoder layers, medium and large 4."""

    projector_norm: ClassVar[str] = "layer"

    backbone: str = "dinov2_small"
    backbone_windows: int = field(default=2, metadata=LATER)
    backbone_maps: tuple[int, ...] = field(default=(2, 5, 8, 11), metadata=LATER)
    backbone_full_attention: tuple[int, ...] = field(default=(3, 6, 9), metadata=LATER)
    backbone_grid: int = field(default=24, metadata=LATER)  # of 384 px; small 32, medium 36, large 44
    decoder_layers: int = 2


def rf_detr(config: RfDetrConfig, num_classes: int) -> DetrModel:
    """The network of the paper's figure 2, with random weights; LW-DETR's with other parts."""
    return lw_detr(config, num_classes)


FOURTEEN = 14  # pixels of a patch of RF-DETR base, the first release
XL = (20, 35)  # pixels of a patch, and patches per side of its positions


def _of_base(state: StateDict, value: Any) -> Any:
    """A value of RF-DETR base; None for the others."""
    return value if _patch(state) == FOURTEEN else None


def _windows(state: StateDict) -> int | None:
    """Per side, by patch and positions: no tensor shows them."""
    table = state.weights.get("backbone.position.table")
    if table is not None and (_patch(state), math.isqrt(table.shape[1] - 1)) == XL:
        return 1
    return _of_base(state, 4)


def _patch(state: StateDict) -> int | None:
    patch = state.weights.get("backbone.patch.weight")
    return None if patch is None else patch.shape[-1]


def _resize(values: Mapping[str, Any]) -> PublishedResize:
    """The square that the positions are for; RF-DETR base has DINOv2's own positions, and 560 px."""
    patch, grid = values.get("backbone_patch", 16), values.get("backbone_grid", 24)
    return PublishedResize(square=560 if patch == FOURTEEN else patch * grid)


MEMBER = Member(
    name="rf_detr",
    config=RfDetrConfig,
    builder=rf_detr,
    paper="Robinson et al. 2025, arXiv:2511.09554",
    published=(2025, 11),
    roles=GROUP_ROLES,
    per_class=GROUP_PER_CLASS,
    original_init=GROUP_INIT,
    layouts=(
        Layout(
            "transformers, in memory", r"^model\.backbone\.projector\.projector_layer\.", group_detr_names.transformers
        ),
        # transformers writes and reads the authors' names.
        Layout("transformers, roboflow/rf-detr", r"^backbone\.0\.encoder\.encoder\.", group_detr_names.rf_detr),
    ),
    transformers={
        "rf_detr": TransformersClass(
            "RfDetrForObjectDetection", transformers_keys.RF_DETR, timm=False, windowed_vit="rf_detr_dinov2"
        )
    },
    readers={
        **GROUP_READERS,
        "backbone_windows": _windows,
        "backbone_maps": lambda state: _of_base(state, (1, 4, 7, 10)),
        "backbone_full_attention": lambda state: _of_base(state, (2, 5, 8)),
    },
    unreadable=UNREADABLE,
    resize=PublishedResize(square=384),
    resize_by=_resize,
)
