"""The family: every member by name, as a frozen configuration and the function that builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgedetr.errors import ModelError, did_you_mean
from edgedetr.models import original_init
from edgedetr.models.detector import DetrModel
from edgedetr.models.members.anchor_detr import AnchorDetrConfig, anchor_detr
from edgedetr.models.members.conditional_detr import ConditionalDetrConfig, conditional_detr
from edgedetr.models.members.deformable_detr import DeformableDetrConfig, deformable_detr
from edgedetr.models.members.detr import DetrConfig, detr
from edgedetr.models.members.dn_detr import DnDetrConfig, dn_detr
from edgedetr.models.members.dynamic_detr import DynamicDetrConfig, dynamic_detr
from edgedetr.models.members.efficient_detr import EfficientDetrConfig, efficient_detr
from edgedetr.models.members.rt_detr import RtDetrConfig, rt_detr
from edgedetr.models.members.sparse_rcnn import SparseRcnnConfig, sparse_rcnn


@dataclass(frozen=True)
class Member:
    """One detector of the family: its configuration, its builder (config, number of classes), its paper."""

    config: type[Any]  # a frozen dataclass; every member has its own
    build: Callable[..., DetrModel]
    paper: str


FAMILY: dict[str, Member] = {
    "detr": Member(DetrConfig, detr, "Carion et al. 2020, arXiv:2005.12872"),
    "deformable_detr": Member(DeformableDetrConfig, deformable_detr, "Zhu et al. 2021, arXiv:2010.04159"),
    "conditional_detr": Member(ConditionalDetrConfig, conditional_detr, "Meng et al. 2021, arXiv:2108.06152"),
    "efficient_detr": Member(EfficientDetrConfig, efficient_detr, "Yao et al. 2021, arXiv:2104.01318"),
    "anchor_detr": Member(AnchorDetrConfig, anchor_detr, "Wang et al. 2021, arXiv:2109.07107"),
    "dynamic_detr": Member(DynamicDetrConfig, dynamic_detr, 'Dai et al. 2021, ICCV, "Dynamic DETR"'),
    "sparse_rcnn": Member(SparseRcnnConfig, sparse_rcnn, "Sun et al. 2021, arXiv:2011.12450"),
    "dn_detr": Member(DnDetrConfig, dn_detr, "Li et al. 2022, arXiv:2203.01305; Liu et al. 2022, arXiv:2201.12329"),
    "rt_detr": Member(RtDetrConfig, rt_detr, "Zhao et al. 2024, arXiv:2304.08069; Lv et al. 2024, arXiv:2407.17140"),
}


def member(name: str) -> Member:
    """A member by its name; ModelError that names the known ones otherwise."""
    if not isinstance(name, str) or name not in FAMILY:
        near = did_you_mean(name, FAMILY) if isinstance(name, str) else ""
        raise ModelError(f"model.name is {name!r:.200}; expected one of {', '.join(FAMILY)}{near}")
    return FAMILY[name]


def build(name: str, config: object, num_classes: int) -> DetrModel:
    """A detector with random weights; `edgedetr.models.checkpoints.pretrained` fills in published ones.

    config  an instance of `member(name).config`
    """
    chosen = member(name)
    if not isinstance(config, chosen.config):
        raise ModelError(f"{name} takes a {chosen.config.__name__}; got {type(config).__name__}")
    if num_classes < 1:
        raise ModelError(f"{num_classes} classes; expected at least one")
    detector = chosen.build(config, num_classes)
    if config.init == "original":  # type: ignore[attr-defined]  # every member's configuration has it
        original_init.original(detector, name)
    return detector
