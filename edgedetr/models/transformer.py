"""What all members have in common: the words of their configurations, their backbone, their first weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from edgedetr.errors import ModelError
from edgedetr.models.backbone import BackboneConfig, ResNet, make_backbone
from edgedetr.models.vit import VitPyramid


@dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """A backbone and the width of the tokens after it; a member's own configuration goes on from here."""

    hidden: int = 256                           # C, channels of every token
    heads: int = 8                              # of every attention: 32 channels each

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden % 4:     # a quarter each for sine and cosine of x and y
            raise ModelError(f"model.hidden is {self.hidden}; expected a multiple of 4 and of {self.heads} heads")


def backbone_of(config: BackboneConfig, levels: Sequence[int], dilate_last: bool = False) -> ResNet | VitPyramid:
    """The backbone that a configuration names, with random weights; see `make_backbone`."""
    return make_backbone(config.backbone, levels, width=config.backbone_width,
                         frozen_norm=config.backbone_norm == "frozen", frozen_stages=config.frozen_stages,
                         dilate_last=dilate_last)


def xavier(*parts: nn.Module) -> None:
    """Xavier-uniform weights for every matrix of the parts, as DETR starts its transformer."""
    for part in parts:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
