"""Vision transformers that detectors cut into windows: widths, heads and what their blocks have, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Design:
    """What the blocks of a published transformer have; its depth and windows are the detector's choice.

    dim, heads   of every block
    class_token  one in each window; its position comes first in the table
    norm         LayerNorm on every map that comes out
    antialias    how positions are interpolated (layers/patch_embedding.py)
    layer_scale  start of the factors on the residual branches
    registers    learned tokens without a position, in each window (Darcet et al. 2024)
    """

    dim: int
    heads: int
    class_token: bool
    norm: bool
    antialias: bool
    layer_scale: float
    registers: int = 0


def _dinov2(dim: int, heads: int, registers: int = 0) -> Design:
    return Design(dim, heads, class_token=True, norm=True, antialias=True, layer_scale=1.0, registers=registers)


def _lw_vit(dim: int) -> Design:
    # 12 heads at every width, and factors that start at 0.1 (CAEv2's, with which they are pretrained).
    return Design(dim, 12, class_token=False, norm=False, antialias=False, layer_scale=0.1)


DESIGNS: dict[str, Design] = {
    "dinov2_small": _dinov2(384, 6),
    "dinov2_base": _dinov2(768, 12),
    "dinov2_small_registers": _dinov2(384, 6, 4),
    "dinov2_base_registers": _dinov2(768, 12, 4),
    "lw_vit_tiny": _lw_vit(192),
    "lw_vit_small": _lw_vit(384),
    "lw_vit_base": _lw_vit(768),
}
