"""Vision transformers of detectors that read several blocks: widths, heads and what the blocks have, by name."""

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


@dataclass(frozen=True)
class RotaryDesign:
    """A transformer of DINOv3's kind (12 blocks, 2-d RoPE) with DEIMv2's spatial tuning adapter beside it.

    dim, heads   of every block
    maps         blocks, from 0, whose outputs are read, for strides 8, 16 and 32
    gated        SwiGLU in the blocks
    pretrained   as Meta's: LayerNorm on every map, registers, LayerScale, keys without a bias, eps 1e-5
    prior        channels of the adapter's stem
    outputs      channels of every level that comes out
    """

    dim: int
    heads: int
    maps: tuple[int, int, int]
    gated: bool
    pretrained: bool
    prior: int
    outputs: int


# Intellindust-AI-Lab/DEIMv2, configs/deimv2/deimv2_dinov3_{s,m,l,x}_coco.yml
ROTARY_DESIGNS: dict[str, RotaryDesign] = {
    "dinov3_tiny": RotaryDesign(192, 3, (3, 7, 11), gated=False, pretrained=False, prior=16, outputs=192),
    "dinov3_tiny_plus": RotaryDesign(256, 4, (3, 7, 11), gated=False, pretrained=False, prior=16, outputs=256),
    "dinov3_small": RotaryDesign(384, 6, (5, 8, 11), gated=False, pretrained=True, prior=32, outputs=224),
    "dinov3_small_plus": RotaryDesign(384, 6, (5, 8, 11), gated=True, pretrained=True, prior=64, outputs=256),
}
