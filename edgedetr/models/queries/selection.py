"""Where queries come from: learned vectors (DETR), or the best tokens of the memory (RT-DETR)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.batched_gather import batched_gather
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear
from edgedetr.models.detector import Memory, Queries

if TYPE_CHECKING:
    from edgedetr.models.member import Role

INVALID = 1e4  # logit of an anchor off the map: sigmoid is exactly 1, and it stays finite in a quantized graph


def label_content(embedding: nn.Embedding | None, labels: Tensor) -> Tensor:
    """What noised queries of known objects start from: labels [B, D] (K = filling) -> [B, D, C].

    embedding  [K + 1, C] of a model that was built with model.denoising, else None
    """
    if embedding is None:
        raise ModelError(
            "this model was built without model.denoising, so it has no vectors for noised labels; "
            "use train.denoising=0"
        )
    return embedding(labels)


class LearnedQueries(nn.Module):
    """Zero content, learned position: DETR's object queries."""

    def __init__(self, queries: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Embedding(queries, dim)

    def forward(self, memory: Memory) -> Queries:
        position = self.position.weight.expand(memory.tokens.shape[0], -1, -1)
        return Queries(torch.zeros_like(position), position=position)


class Anchors(nn.Module):
    """One box per cell of every level: its center, and a side that doubles per level."""

    shape_only = True

    def __init__(self, side: float = 0.05, margin: float = 0.01) -> None:
        """side  of a finest-level box, share of the image; margin: numbers closer to 0 or 1 make a box invalid"""
        super().__init__()
        self.side, self.margin = side, margin

    def forward(self, like: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """-> anchor logits [1, S, 4] (INVALID where not usable) and validity [1, S, 1], 0 or 1."""
        boxes, kind = [], torch.promote_types(like.dtype, torch.float32)  # a bfloat16 cell center is 1/256 off
        for level, (height, width) in enumerate(shapes):
            y = (torch.arange(height, device=like.device, dtype=kind) + 0.5) / height
            x = (torch.arange(width, device=like.device, dtype=kind) + 0.5) / width
            size = torch.full((height * width, 2), self.side * 2.0**level, device=like.device, dtype=kind)
            boxes.append(torch.cat([x.repeat(height)[:, None], y.repeat_interleave(width)[:, None], size], dim=1))
        anchors = torch.cat(boxes)[None]
        valid = ((anchors > self.margin) & (anchors < 1 - self.margin)).all(-1, keepdim=True)
        return torch.where(valid, torch.log(anchors / (1 - anchors)), INVALID), valid.to(like.dtype)


class TopKQueries(nn.Module):
    """A class score for every token; the best N become queries, with their box as reference.

    denoising_class_embed [K + 1, C] is content for noised queries in training (its last row is padding). content
    [N, C], where learned, is what the best, the second best, ... starts from in the place of its token (Zhang et al.
    2022, "DINO", section 3.4; `learnt_init_query` of RT-DETR's code).
    """

    ROLES: ClassVar[dict[str, Role]] = {"project": "memory_projection"}

    def __init__(
        self, dim: int, num_classes: int, queries: int, denoising: bool = True, learned_content: bool = False
    ) -> None:
        super().__init__()
        self.queries, self.anchors = queries, Anchors()
        self.project, self.norm = Linear(dim, dim), nn.LayerNorm(dim)
        self.score, self.box = Linear(dim, num_classes), Mlp(dim, dim, 4, 3)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes) if denoising else None
        self.content = nn.Embedding(queries, dim) if learned_content else None
        nn.init.xavier_uniform_(self.project.weight)
        if self.denoising_class_embed is not None:
            nn.init.normal_(self.denoising_class_embed.weight[:-1])
        if self.content is not None:
            nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory) -> Queries:
        """Gradients reach the tokens through `encoder` only: content and reference start the decoder as constants."""
        count = memory.tokens.shape[1]
        if count < self.queries:
            raise ModelError(
                f"{self.queries} queries asked for, but the image has {count} cells; "
                f"use a larger input or --set model.queries={count}"
            )
        anchors, valid = self.anchors(memory.tokens, memory.shapes)
        tokens = self.norm(self.project(memory.tokens * valid))  # [B, S, C]
        best = in_float32(self.score, tokens).amax(-1).topk(self.queries, dim=1).indices  # [B, N]
        # Boxes of the chosen tokens only: the head is per token, so choosing first gives the same numbers.
        chosen = batched_gather(tokens, best)
        start = F.embedding(best, anchors[0])
        logits, boxes = in_float32(self.score, chosen), (in_float32(self.box, chosen) + start).sigmoid()
        content = chosen.detach() if self.content is None else self.content.weight.expand(chosen.shape[0], -1, -1)
        return Queries(content, reference=boxes.detach(), encoder=(logits, boxes))

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries of objects that are known, for denoising: labels [B, D] (K = filling), boxes [B, D, 4]."""
        return Queries(label_content(self.denoising_class_embed, labels), reference=boxes)
