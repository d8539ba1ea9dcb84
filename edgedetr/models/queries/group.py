"""Two-stage queries in groups: one group is deployed, and training has more of them, which find every object as well.

Chen et al. 2023, "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment", section 3; with the boxes of
Chen et al. 2024, "LW-DETR", section 3.1. Every query starts from learned content at a proposed box, which a learned
offset moves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgedetr.layers.batched_gather import batched_gather
from edgedetr.layers.deformable_attention import Shapes
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.position import sine_of_boxes
from edgedetr.models.box_heads import move_by_deltas
from edgedetr.models.initialization import xavier
from edgedetr.models.queries.two_stage import IGNORED_LOGIT, TwoStageSelector, cell_boxes
from edgedetr.models.records import Memory, Queries


class CellBoxes(nn.Module):
    """The box that every cell starts from; one of no size where it is not usable."""

    shape_only = True

    def forward(self, like: Tensor, shapes: Shapes, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> boxes [1 or B, S, 4] in 0..1, and usability [1 or B, S, 1], 0 or 1."""
        boxes, usable = cell_boxes(like, shapes, valid)
        return boxes * usable, usable.to(like.dtype)


class QueryGroup(TwoStageSelector):
    """One group: its two-stage head, and what the best, the second best, ... token starts with.

    content  [N, C]  instead of the token (query_feat of the authors' code)
    offset   [N, 4]  by which the proposed box is moved, as a delta of the box head (refpoint_embed)
    """

    def __init__(self, dim: int, num_classes: int, queries: int) -> None:
        super().__init__(dim, num_classes, queries, "best")
        self.anchors = CellBoxes()
        self.content, self.offset = nn.Embedding(queries, dim), nn.Embedding(queries, 4)
        xavier(self.project)
        nn.init.zeros_(self.offset.weight)

    def start(
        self, memory: Memory, anchors: Tensor, usable: Tensor, wanted: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Content [B, N, C] and reference [B, N, 4] of the queries; logits [B, N, K] and boxes [B, N, 4] proposed.

        Content and reference are constants to the tokens, which have a gradient from the proposals alone.
        """
        found = self.rate(memory, anchors, usable, wanted)
        boxes = self._boxes(found.best, found.best_anchors)
        content, offset = self.content.weight[:wanted], self.offset.weight[:wanted]
        logits = batched_gather(found.logits, found.top_k)
        return content.expand(boxes.shape[0], -1, -1), move_by_deltas(offset, boxes.detach()), logits, boxes

    def usable_first(self, rank: Tensor, usable: Tensor) -> Tensor:
        """A box of no size cannot grow, so that an unusable token is no candidate (as transformers computes it)."""
        return rank + (usable[..., 0].to(rank.dtype) - 1) * IGNORED_LOGIT

    def _boxes(self, tokens: Tensor, anchors: Tensor) -> Tensor:
        """tokens [B, M, C] and their boxes [1 or B, M, 4] -> the boxes moved, [B, M, 4]."""
        return move_by_deltas(in_float32(self.box, tokens), anchors)


class GroupQueries(QueryGroup):
    """The deployed group, and `others` beside it in training. All share the position: an MLP of the box's sine.

    The position is that of the box which the first layer starts from, and the same in every layer
    (`lite_refpoint_refine` of LW-DETR's code).
    """

    def __init__(self, dim: int, num_classes: int, queries: int, groups: int) -> None:
        super().__init__(dim, num_classes, queries)
        self.others = nn.ModuleList(QueryGroup(dim, num_classes, queries) for _ in range(groups - 1))
        self.width = dim // 2  # of the sine of each of four coordinates
        self.place = Mlp(4 * self.width, dim, dim, 2)

    def forward(self, memory: Memory) -> Queries:
        content, reference, logits, boxes = self.start(memory, *self.start_boxes(memory))
        return self._placed(content, reference, (logits, boxes))

    def every_group(self, memory: Memory) -> Queries:
        """The queries of all groups, one group after the other; for training.

        An image that was drawn so small that it has fewer cells than queries gets as many queries as cells.
        """
        boxes, wanted = self.start_boxes(memory), min(self.count, memory.tokens.shape[1])
        parts = [group.start(memory, *boxes, wanted) for group in (self, *self.others)]
        content, reference, logits, proposed = (torch.cat(same, dim=1) for same in zip(*parts))
        return self._placed(content, reference, (logits, proposed), len(parts))

    def _placed(self, content: Tensor, reference: Tensor, encoder: tuple[Tensor, Tensor], groups: int = 1) -> Queries:
        waves = sine_of_boxes(reference, self.width).to(content.dtype)
        return Queries(content, self.place(waves), reference, encoder=encoder, groups=groups)
