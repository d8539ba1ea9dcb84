"""Learned queries: vectors (DETR), points, anchor points with patterns, or boxes, the same for every image."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear
from edgedetr.layers.position import sine_of_boxes
from edgedetr.layers.row_column_attention import AxisPosition
from edgedetr.models.records import Memory, Queries
from edgedetr.options import one_of


def label_content(embedding: nn.Embedding | None, labels: Tensor) -> Tensor:
    """The content that noised queries of known objects start from: labels [B, D] (K = filling) -> [B, D, C].

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


class PointQueries(nn.Module):
    """Learned content and position; the reference point is a linear function of the position (Deformable DETR)."""

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


class ReferencePointHead(nn.Module):
    """The reference point of a learned position, and the sine of that point (Conditional DETR, section 3.3)."""

    shape_only = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.per_axis, self.head = dim // 2, Mlp(dim, dim, 2, 2)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position [N, C] -> points [N, 2] in 0..1, their sine [N, C]."""
        logits = self.head(position)
        points = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        return points, sine_of_boxes(points, self.per_axis)


class ConditionalQueries(nn.Module):
    """Zero content, learned position, and the reference point that follows from it (Conditional DETR)."""

    def __init__(self, queries: int, dim: int) -> None:
        super().__init__()
        self.position, self.point = nn.Embedding(queries, dim), ReferencePointHead(dim)

    def forward(self, memory: Memory) -> Queries:
        batch, position = memory.tokens.shape[0], self.position.weight
        points, wave = self.point(position)
        # A batch of one until the memory is read: what is computed from these alone is computed once for all images.
        position, points, wave = position[None], points[None], wave[None]
        content = position.new_zeros(batch, *position.shape[1:])
        return Queries(content, position=position, reference=points, spatial=wave)


class AnchorPoints(nn.Module):
    """Learned or regular points, and their positions: in the plane, and along each axis by the encoder's network."""

    shape_only = True

    def __init__(self, points: int, dim: int, layout: Literal["learned", "grid"], axis: AxisPosition) -> None:
        super().__init__()
        one_of("layout", layout, ("learned", "grid"))
        self.per_axis, self.adapt = dim // 2, Mlp(dim, dim, dim, 2)
        # The encoder owns that network; in a tuple it is not registered here a second time, and is saved once.
        self.axis = (axis,)
        if layout == "learned":
            self.points: Tensor = nn.Parameter(torch.rand(points, 2))
        else:
            side = math.isqrt(points)
            if side**2 != points:
                raise ModelError(
                    f"{points} anchor points do not fill a square grid; use {side**2} or {(side + 1) ** 2}"
                )
            line = (torch.arange(side) + 0.5) / side
            self.register_buffer("points", torch.cartesian_prod(line, line), persistent=False)

    def embed(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points [..., N, 2] in 0..1 -> position [..., N, C], and along x and y [..., N, 2C]."""
        axis = self.axis[0]
        along = torch.cat([axis.along(points[..., 0]), axis.along(points[..., 1])], dim=-1)
        return self.adapt(sine_of_boxes(points, self.per_axis)), along

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """-> points [P, 2], their position [P, C] and that along x and y [P, 2C]."""
        return self.points, *self.embed(self.points)


class AnchorQueries(nn.Module):
    """Every pattern at every anchor point: pattern 0 at all points, then pattern 1 (Anchor DETR, section 3.3).

    Noised queries are at the center of their box and start from the vector of their label instead of a pattern; the
    box's size is lost, because an anchor point has none.
    """

    def __init__(self, points: AnchorPoints, patterns: int, dim: int, num_classes: int, denoising: bool) -> None:
        super().__init__()
        self.points, self.pattern = points, nn.Embedding(patterns, dim)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim) if denoising else None

    def forward(self, memory: Memory) -> Queries:
        points, position, along = self.points()
        batch, (patterns, dim) = memory.tokens.shape[0], self.pattern.weight.shape
        content = self.pattern.weight[:, None].expand(-1, points.shape[0], -1).reshape(-1, dim)
        points, position, along = (x.repeat(patterns, 1) for x in (points, position, along))
        content, points, position, along = (x.expand(batch, -1, -1) for x in (content, points, position, along))
        return Queries(content, position=position, reference=points, spatial=along)

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        content, points = label_content(self.denoising_class_embed, labels), boxes[..., :2]
        position, along = self.points.embed(points)
        return Queries(content, position=position, reference=points, spatial=along)


class BoxQueries(nn.Module):
    """Learned boxes, refined layer by layer (DAB-DETR); with denoising, the content is "label unknown" (DN-DETR).

    denoising_class_embed  [K + 1, C - 1]; row K is the content of every query that looks for an object, whose last
                           channel is 0; noised queries have their label's row and 1
    """

    def __init__(self, queries: int, dim: int, num_classes: int, denoising: bool) -> None:
        super().__init__()
        self.dim, self.box = dim, nn.Embedding(queries, 4)  # box logits
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim - 1) if denoising else None

    def forward(self, memory: Memory) -> Queries:
        batch, boxes = memory.tokens.shape[0], self.box.weight.sigmoid()
        if self.denoising_class_embed is None:
            content = boxes.new_zeros(self.dim)
        else:
            unknown = self.denoising_class_embed.weight[-1]
            content = torch.cat([unknown, torch.zeros_like(unknown[:1])])
        return Queries(content.expand(batch, boxes.shape[0], -1), reference=boxes.expand(batch, -1, -1))

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        content = label_content(self.denoising_class_embed, labels)
        return Queries(torch.cat([content, torch.ones_like(content[..., :1])], dim=-1), reference=boxes)


class BoxPosition(nn.Module):
    """A query's position from its box: the sine of all four numbers, then a small network (DAB-DETR, section 4.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.per_axis, self.head = dim // 2, Mlp(2 * dim, dim, dim, 2)

    def forward(self, reference: Tensor) -> Tensor:
        """reference [B, N, 4] in 0..1 -> [B, N, C]."""
        return self.head(sine_of_boxes(reference, self.per_axis))


class LearnedProposals(nn.Module):
    """N boxes and N vectors; every box starts as the whole image (Sparse R-CNN, section 3.2)."""

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
        return Queries(label_content(self.denoising_class_embed, labels), reference=boxes)
