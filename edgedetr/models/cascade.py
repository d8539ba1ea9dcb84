"""The parts of a cascade over learned boxes: proposals, the reading of a box's content, and R-CNN's box update.

Sun et al. 2021, "Sparse R-CNN", section 3; box deltas as in Girshick et al. 2014, "R-CNN", appendix C.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.dynamic_convolution import DynamicInteraction
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear
from edgedetr.layers.roi_align import RoiAlign
from edgedetr.models.detector import Memory, Queries
from edgedetr.models.queries.selection import label_content

if TYPE_CHECKING:
    from edgedetr.models.member import Role

DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)  # what the head says of x, y, w, h is divided by these (Sparse R-CNN)
LARGEST_GROWTH = math.log(100000 / 16)  # a side grows at most 6250 times, so that exp stays finite (Detectron)


class LearnedProposals(nn.Module):
    """N boxes and N vectors, the same for every image; every box starts as the whole image."""

    def __init__(self, queries: int, dim: int, num_classes: int, denoising: bool = False) -> None:
        super().__init__()
        self.content, self.box = nn.Embedding(queries, dim), nn.Embedding(queries, 4)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim) if denoising else None
        with torch.no_grad():
            self.box.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))

    def forward(self, memory: Memory) -> Queries:
        batch = memory.tokens.shape[0]
        return Queries(self.content.weight.expand(batch, -1, -1), reference=self.box.weight.expand(batch, -1, -1))

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries of objects that are known, for denoising: labels [B, D] (K = filling), boxes [B, D, 4]."""
        return Queries(label_content(self.denoising_class_embed, labels), reference=boxes)


class RoiCrossAttention(nn.Module):
    """Every query reads its own box, and nothing else, by weights that it predicts.

    The two large Linears are most of a decoder's weights, so they have a role of their own.
    """

    ROLES: ClassVar[dict[str, Role]] = {"interaction.weights": "dynamic_head", "interaction.out": "dynamic_head"}

    def __init__(self, roi: RoiAlign, interaction: DynamicInteraction) -> None:
        super().__init__()
        self.roi, self.interaction = roi, interaction

    def forward(self, queries: Queries, memory: Memory) -> Tensor:
        """-> [B, N, C]; see decoder.CrossAttention."""
        if queries.reference is None or queries.reference.shape[-1] != 4:
            raise ModelError("a dynamic head reads the content of boxes; this selector gives no boxes")
        features = self.roi(memory.tokens, memory.shapes, memory.strides, queries.reference)
        return self.interaction(queries.content, features)


class DeltaBoxes(nn.Module):
    """Each layer has its own towers and heads, and moves the box of the layer before relative to its size.

    Boxes are not kept within the image: a side that is cut off has no gradient. The runtime clips them.
    """

    iterative = True
    twice = False

    def __init__(self, dim: int, logits: int, layers: int, class_tower: int, box_tower: int) -> None:
        """class_tower, box_tower  blocks of Linear, LayerNorm, ReLU before each head"""
        super().__init__()
        self.class_tower = nn.ModuleList(_tower(dim, class_tower) for _ in range(layers))
        self.box_tower = nn.ModuleList(_tower(dim, box_tower) for _ in range(layers))
        self.score = nn.ModuleList(Linear(dim, logits) for _ in range(layers))
        self.box = nn.ModuleList(Linear(dim, 4) for _ in range(layers))

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K]."""
        return in_float32(self.score[layer], self.class_tower[layer](features))

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> [B, N, 4], shift and logarithmic growth of the box, times DELTA_WEIGHTS."""
        return in_float32(self.box[layer], self.box_tower[layer](features))

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        """delta, reference [B, N, 4] -> boxes [B, N, 4], cx, cy, w, h in 0..1, float32."""
        if reference is None:
            raise ModelError("R-CNN deltas move a box; this selector gives none")
        kind = torch.promote_types(delta.dtype, torch.float32)
        shift, growth = (delta.to(kind) / delta.new_tensor(DELTA_WEIGHTS, dtype=kind)).split(2, dim=-1)
        center, size = reference.to(kind).split(2, dim=-1)
        return torch.cat([center + shift * size, size * growth.clamp(max=LARGEST_GROWTH).exp()], dim=-1)


def _tower(dim: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        *[module for _ in range(blocks) for module in (Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU())]
    )
