"""Two-stage query selection: a head scores every token of the memory, and the best N become queries.

Zhu et al. 2021, "Deformable DETR", section A.4; Yao et al. 2021, "Efficient DETR", section 4; Zhao et al. 2024,
"RT-DETR", section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from edgedetr.models.encoders.deformable import cell_centers
from edgedetr.models.initialization import xavier
from edgedetr.models.queries.learned import label_content
from edgedetr.models.records import Memory, Queries
from edgedetr.options import one_of

if TYPE_CHECKING:
    from edgedetr.models.roles import Role

SIDE = 0.05  # an anchor's side in the finest level, as a fraction of the image; it doubles per level
MARGIN = 0.01  # an anchor with a number closer to 0 or 1 than this is not usable
IGNORED_LOGIT = 1e4  # logit of an anchor that is not usable: its sigmoid is exactly 1, and it is finite in float16


def cell_boxes(like: Tensor, shapes: Shapes, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The box that every cell starts from, [1 or B, S, 4] in 0..1, and whether it is usable, bool [1 or B, S, 1].

    Its center, and a side that doubles per level.
    """
    centers = cell_centers(like.to(torch.promote_types(like.dtype, torch.float32)), shapes, valid)
    side = torch.cat([torch.full((h * w, 2), SIDE * 2.0**level) for level, (h, w) in enumerate(shapes)])
    boxes = torch.cat([centers, side.to(centers).expand_as(centers)], dim=-1)
    return boxes, ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(-1, keepdim=True)


class Anchors(nn.Module):
    """The box that every cell starts from, as logits."""

    shape_only = True

    def forward(self, like: Tensor, shapes: Shapes, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> logits [1 or B, S, 4] (IGNORED_LOGIT where not usable) and usability [1 or B, S, 1], 0 or 1."""
        boxes, usable = cell_boxes(like, shapes, valid)
        inside = boxes.clamp(MARGIN, 1 - MARGIN)
        return torch.where(usable, torch.log(inside / (1 - inside)), IGNORED_LOGIT), usable.to(like.dtype)


@dataclass
class Candidates:
    """All tokens as the head sees them, and the best N.

    tokens [B, S, C], logits [B, S, K], anchors [1 or B, S, 4] as the selector has them
    top_k [B, N] of the best, in descending order;  best [B, N, C], best_anchors [B, N, 4]
    """

    tokens: Tensor
    logits: Tensor
    anchors: Tensor
    top_k: Tensor
    best: Tensor
    best_anchors: Tensor


class TwoStageSelector(nn.Module):
    """A class score and a box for every token, and the best N of them; the part that all two-stage members share.

    rank    "foreground": by the first class logit, which means any object (Deformable DETR, section A.4);
            "best": by the best class (Efficient DETR, RT-DETR)
    first   queries at the beginning of training, falling linearly to `queries`, as deployed
    projected   tokens are projected and normalized before they are scored; otherwise taken as they are (DEIMv2)
    activation  of the box head
    """

    ROLES: ClassVar[dict[str, Role]] = {"project": "memory_projection"}

    def __init__(
        self,
        dim: int,
        num_classes: int,
        queries: int,
        rank: Literal["foreground", "best"],
        first: int | None = None,
        projected: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        one_of("rank", rank, ("foreground", "best"))
        self.rank, self.queries, self.first = rank, queries, first or queries
        self.count = queries
        self.anchors: nn.Module = Anchors()
        self.project: nn.Module = Linear(dim, dim) if projected else nn.Identity()
        self.norm: nn.Module = nn.LayerNorm(dim) if projected else nn.Identity()
        self.score, self.box = Linear(dim, num_classes), Mlp(dim, dim, 4, 3, activation=activation)

    @property
    def class_agnostic(self) -> bool:
        """Whether the proposals know one class, 0, for every object."""
        return self.rank == "foreground"

    def progress(self, fraction: float) -> None:
        """Sets the number of queries for a fraction (0..1) of the training.

        A copy on which it is not called (moving average, deployment) selects `queries`.
        """
        self.count = round(self.first + (self.queries - self.first) * fraction)

    def candidates(self, memory: Memory) -> Candidates:
        return self.rate(memory, *self.start_boxes(memory))

    def start_boxes(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """The anchor of every token [1 or B, S, 4], and whether it is usable [1 or B, S, 1], 0 or 1."""
        anchors, usable = self.anchors(memory.tokens, memory.shapes, memory.valid)
        if memory.padding is not None:
            usable = usable * (~memory.padding[..., None]).to(usable.dtype)
            anchors = anchors.masked_fill(memory.padding[..., None], IGNORED_LOGIT)
        return anchors, usable

    def rate(self, memory: Memory, anchors: Tensor, usable: Tensor, wanted: int | None = None) -> Candidates:
        """Score every token, from what `start_boxes` gives; wanted: of the best, by default as many as queries."""
        count, wanted = memory.tokens.shape[1], self.count if wanted is None else wanted
        if count < wanted:
            raise ModelError(
                f"{wanted} queries asked for, but the image has {count} cells; "
                f"use a larger input or --set model.queries={count}"
            )
        tokens = self.norm(self.project(memory.tokens * usable))  # [B, S, C]
        logits = in_float32(self.score, tokens)
        rank = logits[..., 0] if self.class_agnostic else logits.amax(-1)
        top_k = self.usable_first(rank, usable).topk(wanted, dim=1).indices  # [B, N]
        best = batched_gather(tokens, top_k)
        best_anchors = batched_gather(anchors, top_k) if len(anchors) > 1 else F.embedding(top_k, anchors[0])
        return Candidates(tokens, logits, anchors, top_k, best, best_anchors)

    def usable_first(self, rank: Tensor, usable: Tensor) -> Tensor:
        """rank [B, S], and usable [1 or B, S, 1] -> the rank that decides; here an unusable token has its own score."""
        return rank

    def proposals(self, memory: Memory) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Tokens of the best cells [B, N, C], their boxes [B, N, 4] in 0..1, and (logits, boxes) of all cells.

        The best boxes are computed separately from all boxes, which the deployed graph does not need. The numbers are
        the same: the head works per token.
        """
        found = self.candidates(memory)
        boxes = self._boxes(found.best, found.best_anchors)
        return found.best, boxes, (found.logits, self._boxes(found.tokens, found.anchors))

    def _boxes(self, tokens: Tensor, anchors: Tensor) -> Tensor:
        """tokens [B, M, C] and their anchors [1 or B, M, 4] -> boxes [B, M, 4] in 0..1."""
        delta = in_float32(self.box, tokens)
        return (delta.to(torch.promote_types(delta.dtype, torch.float32)) + anchors).sigmoid()


class TopKQueries(TwoStageSelector):
    """Content is the token of the cell, or a learned vector per rank; RT-DETR's.

    denoising_class_embed [K + 1, C] is content for noised queries in training (its last row is padding). content
    [N, C], where learned, is what the best, the second best, ... starts from instead of its token (Zhang et al.
    2022, "DINO", section 3.4; `learnt_init_query` of RT-DETR's code).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        queries: int,
        denoising: bool = True,
        learned_content: bool = False,
        projected: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__(dim, num_classes, queries, "best", projected=projected, activation=activation)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes) if denoising else None
        self.content = nn.Embedding(queries, dim) if learned_content else None
        xavier(self.project)
        if self.denoising_class_embed is not None:
            nn.init.normal_(self.denoising_class_embed.weight[:-1])
        if self.content is not None:
            nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory) -> Queries:
        """Gradients reach the tokens through `encoder` only: content and reference start the decoder as constants."""
        found = self.candidates(memory)
        # Of the best tokens only: the heads are per token, so selecting first gives the same numbers.
        # (Without the cast of `_boxes`, which the anchors' type makes needless: exported graphs stay as they were.)
        logits = in_float32(self.score, found.best)
        boxes = (in_float32(self.box, found.best) + found.best_anchors).sigmoid()
        content = found.best.detach()
        if self.content is not None:
            content = self.content.weight.expand(content.shape[0], -1, -1)
        return Queries(content, reference=boxes.detach(), encoder=(logits, boxes))

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        return Queries(label_content(self.denoising_class_embed, labels), reference=boxes)


class ProposalQueries(TwoStageSelector):
    """Content and position follow from the sine of the proposed box (Deformable DETR's two-stage form)."""

    def __init__(self, dim: int, num_classes: int, queries: int, denoising: bool = False) -> None:
        super().__init__(dim, num_classes, queries, "foreground")
        xavier(self.project)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim) if denoising else None
        self.place, self.place_norm = Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        nn.init.xavier_uniform_(self.place.weight)

    def forward(self, memory: Memory) -> Queries:
        """The reference is a constant to the decoder; gradients reach the tokens through `encoder`."""
        _, boxes, encoder = self.proposals(memory)
        reference = boxes.detach()
        position, content = self._embed(reference, memory.tokens.dtype)
        return Queries(content, position=position, reference=reference, encoder=encoder)

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        content = label_content(self.denoising_class_embed, labels)
        return Queries(content, position=self._embed(boxes, content.dtype)[0], reference=boxes)

    def _embed(self, reference: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """reference [B, N, 4] -> position and content, [B, N, C] each."""
        waves = sine(reference, self.place.in_features // 4).to(dtype)
        position, content = self.place_norm(self.place(waves)).chunk(2, dim=-1)
        return position, content


class DenseQueries(TwoStageSelector):
    """Content is the token of the proposed cell, position the sine of its box (Efficient DETR)."""

    def __init__(
        self, dim: int, num_classes: int, queries: int, first: int, coordinates: int = 4, denoising: bool = False
    ) -> None:
        """coordinates  4: the decoder starts from the proposed box; 2: from its center"""
        super().__init__(dim, num_classes, queries, "best", first)
        xavier(self.project)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim) if denoising else None
        self.coordinates = coordinates
        self.place = Mlp(coordinates * dim // 2, dim, dim, 2)

    def forward(self, memory: Memory) -> Queries:
        """The reference is a constant to the decoder, the content is not: its gradient reaches the encoder."""
        content, boxes, encoder = self.proposals(memory)
        reference = boxes.detach()[..., : self.coordinates]
        return Queries(content, position=self._embed(reference, content), reference=reference, encoder=encoder)

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        content, reference = label_content(self.denoising_class_embed, labels), boxes[..., : self.coordinates]
        return Queries(content, position=self._embed(reference, content), reference=reference)

    def _embed(self, reference: Tensor, like: Tensor) -> Tensor:
        """reference [B, N, 2|4] -> position [B, N, C], in the type of `like` [B, N, C]."""
        return self.place(sine(reference, like.shape[-1] // 2).to(like.dtype))
