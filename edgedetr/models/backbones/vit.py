"""Vision Transformer as a backbone: patches, pre-LN blocks, and a pyramid made from the last map alone.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; pyramid and windows: Li et al. 2022, "Exploring Plain Vision
Transformer Backbones for Object Detection" (ViTDet), section 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.lora import merged
from edgedetr.layers.norm import ChannelNorm
from edgedetr.layers.patch_embedding import PatchPosition, from_windows, to_windows
from edgedetr.models.initialization import zero_bias

# channels, heads, blocks (the ViT paper's table 1; tiny and small: Touvron et al. 2021, "DeiT", table 1)
SIZES: dict[str, tuple[int, int, int]] = {
    "vit_tiny": (192, 3, 12),
    "vit_small": (384, 6, 12),
    "vit_base": (768, 12, 12),
}
WINDOW = "_window"  # suffix of a name: attention within windows, but for four blocks
NAMES = (*SIZES, *(name + WINDOW for name in SIZES))

PATCH = 16  # pixels per side
GRID = 14  # patches per side of a 224 px image, which published weights were trained on
EPS = 1e-6  # of every LayerNorm
WINDOW_SIDE = 14  # patches (ViTDet)
GLOBAL_BLOCKS = 4  # evenly spread blocks that attend to the whole image (ViTDet)
PYRAMID = 256  # channels of every level that comes out (ViTDet)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch, small at first (Touvron et al. 2021, "CaiT", eq. 1)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)); attention over all tokens or within windows."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 0,
        layer_scale: float = 0.0,
        *,
        attention: nn.Module | None = None,
        feedforward: nn.Module | None = None,
        eps: float = EPS,
    ) -> None:
        """window  patches per side, 0 = all of the image; layer_scale: start of the factors, 0 = none

        attention, feedforward  in place of the plain ones
        """
        super().__init__()
        self.window = window
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attention = attention or MultiHeadAttention(dim, heads)
        self.feedforward = feedforward or FeedForward(dim, 4 * dim, "gelu")
        self.attention_scale, self.feedforward_scale = (
            LayerScale(dim, layer_scale) if layer_scale else nn.Identity() for _ in range(2)
        )
        self.attention_path, self.feedforward_path = DropPath(), DropPath()

    def forward(self, tokens: Tensor, shape: tuple[int, int], *rotation: Tensor) -> Tensor:
        """tokens [B, (1 +) h * w, C], shape (h, w) in patches -> the same shape.

        rotation  cosine and sine for an attention that turns its queries and keys
        """
        inner = self.attention_norm(tokens)
        if self.window:
            inner = to_windows(inner, shape, self.window)
        inner = self.attention(inner, *rotation) if rotation else self.attention(inner, inner, inner)
        if self.window:
            inner = from_windows(inner, shape, self.window)
        tokens = tokens + self.attention_path(self.attention_scale(inner))
        inner = self.feedforward_scale(self.feedforward(self.feedforward_norm(tokens)))
        return tokens + self.feedforward_path(inner)

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The same function in evaluation mode, with LayerScale's factors in the last Linear of each branch."""
        block = merged(self)  # low-rank adapters first: their sum with the weights is what is scaled
        for branch, last in (("attention", "attention.out"), ("feedforward", "feedforward.down")):
            scale, linear = block.get_submodule(f"{branch}_scale"), block.get_submodule(last)
            if isinstance(scale, LayerScale) and isinstance(linear, nn.Linear):
                linear.weight.mul_(scale.gamma[:, None])
                linear.bias.mul_(scale.gamma)
                setattr(block, f"{branch}_scale", nn.Identity())
        return block

    @torch.no_grad()
    def load_fused(self, fused: nn.Module) -> None:
        """The inverse of `fused`: LayerScale's factors become 1."""
        ones = {name: torch.ones_like(value) for name, value in self.state_dict().items() if name.endswith(".gamma")}
        self.load_state_dict({**ones, **fused.state_dict()})


class VisionTransformer(nn.Module):
    """Patches to tokens of one size; a class token in front, unless blocks look through windows."""

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        *,
        windowed: bool = False,
        layer_scale: float = 0.0,
        window_side: int = WINDOW_SIDE,
        grid: int = GRID,
    ) -> None:
        """windowed  all but GLOBAL_BLOCKS evenly spread blocks attend within windows of window_side patches"""
        super().__init__()
        if dim % heads:
            raise ModelError(
                f"a vision transformer of {dim} channels with {heads} heads; expected a multiple; "
                "change model.backbone_width"
            )
        self.patch = nn.Conv2d(3, dim, PATCH, PATCH)
        self.position = PatchPosition(dim, grid, class_token=not windowed)
        self.class_token = None if windowed else nn.Parameter(torch.empty(1, 1, dim))
        every = max(depth // GLOBAL_BLOCKS, 1)
        self.blocks = nn.ModuleList(
            VitBlock(dim, heads, window_side if windowed and (index + 1) % every else 0, layer_scale)
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim, EPS)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                zero_bias(module)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalized, sides multiples of 16 -> tokens [B, (1 +) H/16 * W/16, C]."""
        grid = self.patch(images)  # [B, C, h, w]
        shape = (grid.shape[2], grid.shape[3])
        tokens = grid.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.position(shape)
        for block in self.blocks:
            tokens = block(tokens, shape)
        return self.norm(tokens)


class VitPyramid(nn.Module):
    """Images to maps of several strides, each from the transformer's last map (ViTDet's simple feature pyramid).

    channels, strides  of those maps, for the modules that read them
    """

    def __init__(self, transformer: VisionTransformer, levels: Sequence[int], channels: int) -> None:
        """levels  2..5, strides 4..32, as a ResNet's C2..C5"""
        super().__init__()
        self.transformer, dim = transformer, transformer.norm.normalized_shape[0]
        self.levels = nn.ModuleList(_level(number, dim, channels) for number in levels)
        self.channels, self.strides = [channels] * len(levels), [2**number for number in levels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalized, sides multiples of 32 -> one map [B, C', H/stride, W/stride] per level."""
        shape = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        tokens = self.transformer(images)
        if self.transformer.class_token is not None:
            tokens = tokens[:, 1:]
        last = tokens.transpose(1, 2).unflatten(2, shape)
        return [level(last) for level in self.levels]

    def layers_above(self, parameter: str) -> int:
        """The exponent of train.layer_decay for one of its parameters; 0 in the pyramid."""
        trunk = "transformer."
        inside = parameter.startswith(trunk)
        return layers_above(parameter.removeprefix(trunk), len(self.transformer.blocks)) if inside else 0

    def freeze(self, stages: int) -> None:
        """Stop training of the patch embedding (1) and of each quarter of the blocks after it (2 = the first, ...)."""
        freeze_trunk(self.transformer, stages)


def layers_above(parameter: str, depth: int) -> int:
    """The exponent of train.layer_decay for a parameter of a transformer of `depth` blocks.

    depth - i in block i (from 0); patch and position embeddings and the tokens that are no patches: depth + 1; else 0
    """
    block = re.match(r"blocks\.(\d+)\.", parameter)
    if block:
        return depth - int(block[1])
    return depth + 1 if re.match(r"patch|position|class_token|register_tokens", parameter) else 0


def freeze_trunk(trunk: nn.Module, stages: int) -> None:
    """Stop training of a transformer's embeddings (1) and of each quarter of its blocks after them (2 = the first)."""
    blocks = list(trunk.get_submodule("blocks").children())
    frozen = {f"blocks.{index}." for index in range(max(stages - 1, 0) * len(blocks) // 4)}
    for name, parameter in trunk.named_parameters():
        embedding = stages and re.match(r"patch|position|class_token|register_tokens", name)
        if embedding or any(name.startswith(block) for block in frozen):
            parameter.requires_grad_(False)


def _level(number: int, dim: int, channels: int) -> nn.Sequential:
    """Stride 16 to stride 2^number, then a 1x1 and a 3x3 convolution."""
    resize: dict[int, list[nn.Module]] = {
        2: [
            nn.ConvTranspose2d(dim, dim // 2, 2, 2),
            ChannelNorm(dim // 2, EPS),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
        ],
        3: [nn.ConvTranspose2d(dim, dim // 2, 2, 2)],
        4: [],
        5: [nn.MaxPool2d(2, 2)],
    }
    inputs = {2: dim // 4, 3: dim // 2}.get(number, dim)
    return nn.Sequential(
        *resize[number],
        nn.Conv2d(inputs, channels, 1, bias=False),
        ChannelNorm(channels, EPS),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels, EPS),
    )


def vit(
    name: str, levels: Sequence[int], *, width: float = 1.0, frozen_stages: int = 0, layer_scale: float = 0.0
) -> VitPyramid:
    """A vision transformer by its name, "vit_tiny" .. "vit_base", each also as "..._window".

    layer_scale  start of the learned factors on its residual branches; 0 = none
    """
    dim, heads, depth = SIZES[name.removesuffix(WINDOW)]
    trunk = VisionTransformer(round(dim * width), heads, depth, windowed=name.endswith(WINDOW), layer_scale=layer_scale)
    net = VitPyramid(trunk, levels, round(PYRAMID * width))
    net.freeze(frozen_stages)
    return net
