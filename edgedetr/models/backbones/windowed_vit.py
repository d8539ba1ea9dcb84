"""Vision transformers of LW-DETR and RF-DETR: windows from the first block on, and the maps of several blocks.

Chen et al. 2024, "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection", section 3.3 (window-major order
of the tokens, maps of several blocks); Robinson et al. 2025, "RF-DETR" (DINOv2 with windows); Oquab et al. 2023,
"DINOv2". Read in Atten4Vis/LW-DETR and roboflow/rf-detr.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError, did_you_mean
from edgedetr.layers.patch_embedding import PatchPosition, merge_windows, split_windows
from edgedetr.models.backbones.vit import EPS, VitBlock, freeze_trunk, layers_above
from edgedetr.models.backbones.vit_designs import DESIGNS, Design
from edgedetr.models.initialization import zero_bias
from edgedetr.models.roles import Role


class WindowedVit(nn.Module):
    """Images to the maps of several blocks, all at the stride of a patch.

    The tokens are cut into windows x windows parts once. A block sees one part, or, without any move of data, all
    parts of an image: attention does not depend on the order of its tokens. Where there is a class token, each window
    has its own copy.

    channels, strides  of the maps
    size_multiple      pixels: patch times windows
    """

    ROLES: ClassVar[dict[str, Role]] = {"patch": "patch_embedding"}

    def __init__(
        self, design: Design, *, patch: int, windows: int, maps: Sequence[int], full_attention: Sequence[int], grid: int
    ) -> None:
        """patch      pixels per side
        windows         per side of the image; 1 = none
        maps            blocks, from 0, whose outputs are returned; the last one is the last of the transformer
        full_attention  blocks, from 0, that attend to the whole image
        grid            patches per side in the table of positions
        """
        super().__init__()
        d, depth = design, max(maps) + 1
        self.patch = nn.Conv2d(3, d.dim, patch, patch)
        self.position = PatchPosition(d.dim, grid, d.class_token, d.antialias)
        self.class_token = nn.Parameter(torch.empty(1, 1, d.dim)) if d.class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, d.registers, d.dim)) if d.registers else None
        self.blocks = nn.ModuleList(VitBlock(d.dim, d.heads, layer_scale=d.layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(d.dim, EPS) if d.norm else nn.Identity()
        self.windows, self.maps, self.full_attention = windows, tuple(maps), tuple(full_attention)
        self.beside = d.class_token + d.registers  # tokens of a window that are no patches
        self.channels, self.strides = [d.dim] * len(maps), [patch] * len(maps)
        self.size_multiple = patch * windows
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                zero_bias(module)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalized, sides multiples of size_multiple -> maps [B, C, H/patch, W/patch]."""
        cells = self.patch(images)  # [B, C, h, w]
        shape = (cells.shape[2], cells.shape[3])
        tokens = self._windows_of(cells.flatten(2).transpose(1, 2), shape)  # [B windows^2, n, C]
        inside = tokens.shape[1]
        found = []
        for number, block in enumerate(self.blocks):
            if number in self.full_attention:
                tokens = block(tokens.reshape(-1, self.windows**2 * inside, tokens.shape[2]), shape)
                tokens = tokens.reshape(-1, inside, tokens.shape[2])
            else:
                tokens = block(tokens, shape)
            if number in self.maps:
                found.append(self._map_of(tokens, shape))
        return found

    def _windows_of(self, patches: Tensor, shape: tuple[int, int]) -> Tensor:
        """Patches [B, h * w, C] with their positions, cut into windows; in front of each, its other tokens."""
        position = self.position(shape)
        if self.class_token is None:
            return split_windows(patches + position, shape, self.windows)
        first, cells = position[:, :1], position[:, 1:]
        windows = split_windows(patches + cells, shape, self.windows)
        beside = [self.class_token + first, *([] if self.register_tokens is None else [self.register_tokens])]
        return torch.cat([*(token.expand(windows.shape[0], -1, -1) for token in beside), windows], dim=1)

    def _map_of(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Tokens of windows -> their map [B, C, h, w], normalized."""
        cells = self.norm(tokens[:, self.beside :] if self.beside else tokens)
        return merge_windows(cells, shape, self.windows).transpose(1, 2).unflatten(2, shape)

    def layers_above(self, parameter: str) -> int:
        """The exponent of train.layer_decay for one of its parameters, as of every ViT (`vit.layers_above`)."""
        return layers_above(parameter, len(self.blocks))

    def freeze(self, stages: int) -> None:
        """Stop training of the patch embedding (1) and of each quarter of the blocks after it (2 = the first, ...)."""
        freeze_trunk(self, stages)


def windowed_vit(
    name: str,
    *,
    width: float = 1.0,
    patch: int,
    windows: int,
    maps: Sequence[int],
    full_attention: Sequence[int],
    grid: int,
    frozen_stages: int = 0,
    layer_scale: float = 0.0,
) -> WindowedVit:
    """A transformer by its name in vit_designs.py; its numbers as in `WindowedVit`.

    layer_scale  start of the factors on its residual branches; 0 = the design's

    Errors: ModelError for an unknown name, and for numbers that do not fit together.
    """
    if name not in DESIGNS:
        raise ModelError(
            f"model.backbone is {name!r}; expected one of {', '.join(DESIGNS)}{did_you_mean(name, DESIGNS)}"
        )
    design, maps, full = DESIGNS[name], list(maps), list(full_attention)
    dim = round(design.dim * width)
    if dim % design.heads:
        raise ModelError(
            f"a vision transformer of {dim} channels with {design.heads} heads; expected a multiple; "
            "change model.backbone_width"
        )
    if not maps or maps != sorted(set(maps)):
        raise ModelError(f"model.backbone_maps is {maps}; expected numbers of blocks, from 0, that ascend")
    if full != sorted(set(full)) or max(full, default=0) > maps[-1]:
        raise ModelError(
            f"model.backbone_full_attention is {full}; expected numbers of blocks, from 0, that ascend, "
            f"at most {maps[-1]}, the last of model.backbone_maps"
        )
    design = replace(design, dim=dim, layer_scale=layer_scale or design.layer_scale)
    net = WindowedVit(design, patch=patch, windows=windows, maps=maps, full_attention=full, grid=grid)
    net.freeze(frozen_stages)
    return net
