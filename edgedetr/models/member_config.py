"""The part of a configuration that all members share: backbone, width of the tokens, ranges of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from edgedetr.errors import ModelError
from edgedetr.models.backbones.backbone import BackboneConfig
from edgedetr.options import LATER, Range, check

# Ranges of the numbers that several members have, by field name; wide enough for any paper, and narrow enough that no
# typing error fills the memory. Those of one member alone are in its `ranges`.
WIDTHS, FRACTIONS = (1, 32768), (0, 0.99)
RANGES: dict[str, Range] = {
    "backbone_width": (0.05, 8),
    "frozen_stages": (0, 5),
    "mean": (-1000, 1000),
    "std": (1e-6, 1000),
    "layer_scale": (0, 1),
    "hidden": (4, 8192),
    "heads": (1, 256),
    "dropout": FRACTIONS,
    "queries": (1, 10000),
    "encoder_layers": (0, 100),
    "decoder_layers": (1, 100),
    "ffn": WIDTHS,
    "dynamic_hidden": WIDTHS,
    "levels": (1, 10),
    "points": (1, 100),
    "roi_px": (1, 64),
    "roi_samples": (1, 16),
}


def require_encoder_width(width: int, heads: int) -> None:
    """Errors: ModelError for a width of a hybrid encoder that neither is 0 nor fits heads and positions."""
    if width % heads or width % 4 or width < 0:
        raise ModelError(
            f"model.encoder_width is {width}; expected 0 (as model.hidden), or a multiple of 4 and of {heads} heads"
        )


@dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """A backbone and the width of the tokens after it; members extend it with their own fields."""

    ranges: ClassVar[Mapping[str, Range]] = {}  # of the fields that the member alone has
    has_sides: ClassVar[bool] = False  # boxes are distributions of their sides, with losses of their own (D-FINE)

    hidden: int = 256  # C, channels of every token
    heads: int = 8  # of every attention: 32 channels each
    # First weights: ours, or as the authors' code draws them (models/initialization.py compares them).
    init: Literal["default", "original"] = field(default="default", metadata=LATER, kw_only=True)

    def __post_init__(self) -> None:
        check(self, "model", {**RANGES, **self.ranges})
        if self.hidden % self.heads or self.hidden % 4:  # a quarter each for sine and cosine of x and y
            raise ModelError(f"model.hidden is {self.hidden}; expected a multiple of 4 and of {self.heads} heads")
