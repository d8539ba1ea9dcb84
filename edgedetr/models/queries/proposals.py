"""Queries that start at a place: learned points, or the best of the boxes that a head proposes for every cell.

Zhu et al. 2021, "Deformable DETR", sections 4.2 and A.4; Yao et al. 2021, "Efficient DETR", section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.batched_gather import batched_gather
from edgedetr.layers.deformable_attention import Shapes
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear
from edgedetr.layers.position import sine
from edgedetr.models.detector import Memory, Queries
from edgedetr.models.encoders.deformable import cell_centers
from edgedetr.models.queries.selection import INVALID, label_content
from edgedetr.options import one_of

if TYPE_CHECKING:
    from edgedetr.models.member import Role

SIDE = 0.05  # a proposal's side in the finest level, share of the image; it doubles per level
MARGIN = 0.01  # numbers closer to 0 or 1 than this make a proposal unusable


class PointQueries(nn.Module):
    """Learned content and position; the reference point is a linear function of the position."""

    def __init__(self, queries: int, dim: int) -> None:
        super().__init__()
        self.embed, self.reference = nn.Embedding(queries, 2 * dim), Linear(dim, 2)
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)

    def forward(self, memory: Memory) -> Queries:
        position, content = self.embed.weight.expand(memory.tokens.shape[0], -1, -1).chunk(2, dim=-1)
        reference = in_float32(self.reference, position)
        reference = reference.to(torch.promote_types(reference.dtype, torch.float32)).sigmoid()
        return Queries(content, position=position, reference=reference)


class Starts(nn.Module):
    """The box that every cell starts from, as logits; cells at the border are not usable."""

    shape_only = True

    def forward(self, like: Tensor, shapes: Shapes, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> logits [1 or B, S, 4] (INVALID where not usable) and usability [1 or B, S, 1], 0 or 1."""
        centers = cell_centers(like.to(torch.promote_types(like.dtype, torch.float32)), shapes, valid)
        side = torch.cat([torch.full((h * w, 2), SIDE * 2.0**level) for level, (h, w) in enumerate(shapes)])
        boxes = torch.cat([centers, side.to(centers).expand_as(centers)], dim=-1)
        usable = ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(-1, keepdim=True)
        inside = boxes.clamp(MARGIN, 1 - MARGIN)
        return torch.where(usable, torch.log(inside / (1 - inside)), INVALID), usable.to(like.dtype)


class Proposals(nn.Module):
    """A class score and a box for every cell; the best N boxes are where queries start.

    rank    "foreground": by the first class logit, which then stands for any object (Deformable DETR, section A.4);
            "best": by the best class (Efficient DETR)
    first   queries at the beginning of training, falling linearly to `queries`, which is what is deployed
    """

    ROLES: ClassVar[dict[str, Role]] = {"project": "memory_projection"}

    def __init__(
        self, dim: int, num_classes: int, queries: int, rank: Literal["foreground", "best"], first: int | None = None
    ) -> None:
        super().__init__()
        one_of("rank", rank, ("foreground", "best"))
        self.rank, self.queries, self.first = rank, queries, first or queries
        self.count = queries
        self.starts = Starts()
        self.project, self.norm = Linear(dim, dim), nn.LayerNorm(dim)
        self.score, self.box = Linear(dim, num_classes), Mlp(dim, dim, 4, 3)
        nn.init.xavier_uniform_(self.project.weight)

    @property
    def foreground(self) -> bool:
        """Whether every object is of class 0 to the proposals."""
        return self.rank == "foreground"

    def progress(self, share: float) -> None:
        """How far training is, 0..1; a copy that is never told (moving average, deployment) selects `queries`."""
        self.count = round(self.first + (self.queries - self.first) * share)

    def propose(self, memory: Memory) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Tokens of the best cells [B, N, C], their boxes [B, N, 4] in 0..1, and (logits, boxes) of all cells."""
        count = memory.tokens.shape[1]
        if count < self.count:
            raise ModelError(
                f"{self.count} queries asked for, but the image has {count} cells; "
                f"use a larger input or --set model.queries={count}"
            )
        starts, usable = self.starts(memory.tokens, memory.shapes, memory.valid)
        if memory.padding is not None:
            usable = usable * (~memory.padding[..., None]).to(usable.dtype)
            starts = starts.masked_fill(memory.padding[..., None], INVALID)
        tokens = self.norm(self.project(memory.tokens * usable))  # [B, S, C]
        logits = in_float32(self.score, tokens)
        rank = logits[..., 0] if self.foreground else logits.amax(-1)
        best = rank.topk(self.count, dim=1).indices  # [B, N]
        # The chosen boxes are computed apart from all boxes, of which the deployed graph has no use. Same numbers: the
        # head is per token.
        chosen = batched_gather(tokens, best)
        start = batched_gather(starts, best) if len(starts) > 1 else F.embedding(best, starts[0])
        return chosen, self._boxes(chosen, start), (logits, self._boxes(tokens, starts))

    def _boxes(self, tokens: Tensor, start: Tensor) -> Tensor:
        delta = in_float32(self.box, tokens)
        return (delta.to(torch.promote_types(delta.dtype, torch.float32)) + start).sigmoid()


class TwoStageQueries(Proposals):
    """Content and position follow from the sine of the proposed box (Deformable DETR's two-stage form)."""

    def __init__(self, dim: int, num_classes: int, queries: int, denoising: bool = False) -> None:
        super().__init__(dim, num_classes, queries, "foreground")
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim) if denoising else None
        self.place, self.place_norm = Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        nn.init.xavier_uniform_(self.place.weight)

    def forward(self, memory: Memory) -> Queries:
        """The reference is a constant to the decoder; gradients reach the tokens through `encoder`."""
        _, boxes, encoder = self.propose(memory)
        reference = boxes.detach()
        position, content = self._placed(reference, memory.tokens.dtype)
        return Queries(content, position=position, reference=reference, encoder=encoder)

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries of objects that are known, for denoising: labels [B, D] (K = filling), boxes [B, D, 4]."""
        content = label_content(self.denoising_class_embed, labels)
        return Queries(content, position=self._placed(boxes, content.dtype)[0], reference=boxes)

    def _placed(self, reference: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """reference [B, N, 4] -> position and content, [B, N, C] each."""
        waves = sine(reference, self.place.in_features // 4).to(kind)
        position, content = self.place_norm(self.place(waves)).chunk(2, dim=-1)
        return position, content


class DenseQueries(Proposals):
    """Content is the token of the proposed cell, position the sine of its box (Efficient DETR)."""

    def __init__(
        self, dim: int, num_classes: int, queries: int, first: int, coordinates: int = 4, denoising: bool = False
    ) -> None:
        """coordinates  4: the decoder starts from the proposed box; 2: from its center"""
        super().__init__(dim, num_classes, queries, "best", first)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim) if denoising else None
        self.coordinates = coordinates
        self.place = Mlp(coordinates * dim // 2, dim, dim, 2)

    def forward(self, memory: Memory) -> Queries:
        """The reference is a constant to the decoder, the content is not: its gradient reaches the encoder."""
        chosen, boxes, encoder = self.propose(memory)
        reference = boxes.detach()[..., : self.coordinates]
        waves = sine(reference, memory.tokens.shape[-1] // 2).to(chosen.dtype)
        return Queries(chosen, position=self.place(waves), reference=reference, encoder=encoder)

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries of objects that are known, for denoising: labels [B, D] (K = filling), boxes [B, D, 4]."""
        content, reference = label_content(self.denoising_class_embed, labels), boxes[..., : self.coordinates]
        waves = sine(reference, content.shape[-1] // 2).to(content.dtype)
        return Queries(content, position=self.place(waves), reference=reference)
