"""The decoder: queries look at each other and at the memory, layer by layer, and every layer predicts boxes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.box_ops import inverse_sigmoid
from edgedetr.layers.conditional_attention import ConditionalAttention, ConditionalSelfAttention
from edgedetr.layers.deformable_attention import DeformableAttention
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.feedforward import FeedForward, Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear
from edgedetr.layers.row_column_attention import RowColumnAttention
from edgedetr.models.detector import Memory, Outputs, Queries

if TYPE_CHECKING:
    from edgedetr.models.member import Role


class CrossAttention(Protocol):
    """How queries read the memory: content [B, N, C] -> [B, N, C]."""

    def __call__(self, queries: Queries, memory: Memory) -> Tensor: ...


def placed(content: Tensor, position: Tensor | None) -> Tensor:
    """Content with its position added, where there is one."""
    return content if position is None else content + position


class DenseCrossAttention(MultiHeadAttention):
    """Every query against every token."""

    ROLES: ClassVar[dict[str, Role]] = {"k": "memory_projection", "v": "memory_projection"}

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, position_on_value: bool = False) -> None:
        """position_on_value  values carry the tokens' position as well as keys do (not so in DETR)"""
        super().__init__(dim, heads, dropout)
        self.position_on_value = position_on_value

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        mask = None if memory.padding is None else memory.padding[:, None, None]
        query, key = placed(queries.content, queries.position), placed(memory.tokens, memory.position)
        return super().forward(query, key, key if self.position_on_value else memory.tokens, mask)


class DeformableCrossAttention(DeformableAttention):
    """Every query at a few points around its reference box."""

    ROLES: ClassVar[dict[str, Role]] = {"value": "memory_projection"}

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        if queries.reference is None:
            raise ModelError("deformable attention samples around a reference; this selector gives none")
        query = placed(queries.content, queries.position)
        return super().forward(query, queries.reference, memory.tokens, memory.shapes, memory.padding, memory.valid)


class ConditionalCrossAttention(ConditionalAttention):
    """Every query against every token, content and position apart."""

    ROLES: ClassVar[dict[str, Role]] = {"k": "memory_projection", "v": "memory_projection"}

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        if queries.spatial is None or memory.position is None:
            raise ModelError("conditional attention compares places; this decoder or encoder gives none")
        return super().forward(
            queries.content, queries.position, queries.spatial, memory.tokens, memory.position, memory.padding
        )


class RowColumnCrossAttention(RowColumnAttention):
    """Every query against the columns and the rows of the one map.

    k_x and k_y have no role of their own: they read H + W tokens where v reads H x W.
    """

    ROLES: ClassVar[dict[str, Role]] = {"v": "memory_projection"}

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        if queries.spatial is None or memory.axes is None:
            raise ModelError("row-column attention needs positions along each axis; selector or encoder gives none")
        x, y = queries.spatial.chunk(2, dim=-1)
        return super().forward(
            queries.content + x, queries.content + y, memory.tokens, memory.axes, memory.shapes[0], memory.padding
        )


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; LayerNorm after (post) or before (pre) each."""

    def __init__(
        self,
        self_attention: MultiHeadAttention | ConditionalSelfAttention | None,
        cross_attention: nn.Module,
        feedforward: FeedForward,
        dim: int,
        dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        """self_attention  None: queries go straight to the memory, as may be in a first layer that has no content"""
        super().__init__()
        self.self_attention, self.cross_attention, self.feedforward = self_attention, cross_attention, feedforward
        self.self_norm = None if self_attention is None else nn.LayerNorm(dim)
        self.cross_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.path, self.pre_norm = nn.Dropout(dropout), DropPath(), pre_norm

    def forward(self, queries: Queries, memory: Memory) -> Tensor:
        """-> the new content [B, N, C]."""
        content = queries.content
        if self.self_norm is not None:
            inner = self.self_norm(content) if self.pre_norm else content
            content = content + self.path(self.dropout(self._among(inner, queries)))
            content = content if self.pre_norm else self.self_norm(content)
        inner = self.cross_norm(content) if self.pre_norm else content
        content = content + self.path(self.dropout(self.cross_attention(replace(queries, content=inner), memory)))
        if self.pre_norm:
            return content + self.path(self.feedforward(self.feedforward_norm(content)))
        content = self.cross_norm(content)
        return self.feedforward_norm(content + self.path(self.feedforward(content)))

    def _among(self, content: Tensor, queries: Queries) -> Tensor:
        """Self-attention of the content [B, N, C], with the position added to it or projected apart."""
        if isinstance(self.self_attention, ConditionalSelfAttention):
            if queries.position is None:
                raise ModelError("conditional self-attention projects the position apart; this decoder gives none")
            return self.self_attention(content, queries.position, queries.self_mask)
        place = placed(content, queries.position)
        return self.self_attention(place, place, content, queries.self_mask)  # type: ignore[misc]  # it is there


class BoxUpdate(Protocol):
    """The heads, and how a box follows from what they say.

    iterative  every layer moves the box of the layer before, so each needs its delta, also where only the last counts
    twice      the loss of a layer reaches the box of the layer before as well
    """

    iterative: bool
    twice: bool

    def classify(self, layer: int, features: Tensor) -> Tensor: ...

    def delta(self, layer: int, features: Tensor) -> Tensor: ...

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor: ...


class AbsoluteBoxes(nn.Module):
    """One pair of heads for all layers: the box straight from the features (DETR), or from where the reference is."""

    def __init__(self, dim: int, logits: int, iterative: bool = False, box_layers: int = 3) -> None:
        """iterative  every layer moves the box of the layer before (DAB-DETR, section 4.3)"""
        super().__init__()
        self.iterative = self.twice = iterative
        self.score, self.box = Linear(dim, logits), Mlp(dim, dim, 4, box_layers)

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K*]."""
        return in_float32(self.score, features)

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> box logits [B, N, 4], to be added to those of the reference where there is one."""
        return in_float32(self.box, features)

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        return move(delta, reference)


class IterativeBoxes(nn.Module):
    """Each layer has its own heads and moves the box of the layer before (Deformable DETR, section 4.2)."""

    iterative = True

    def __init__(self, dim: int, logits: int, layers: int, twice: bool = True) -> None:
        """twice  the loss of a layer reaches the box of the layer before as well (DINO, section 3.5)"""
        super().__init__()
        self.twice = twice
        self.score = nn.ModuleList(Linear(dim, logits) for _ in range(layers))
        self.box = nn.ModuleList(Mlp(dim, dim, 4, 3) for _ in range(layers))

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K]."""
        return in_float32(self.score[layer], features)

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> box logits [B, N, 4], to be added to those of the reference."""
        return in_float32(self.box[layer], features)

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        return move(delta, reference)


def move(delta: Tensor, reference: Tensor | None) -> Tensor:
    """Box logits [B, N, 4], from the reference [B, N, 2|4] in 0..1 where there is one -> boxes [B, N, 4] in 0..1.

    A reference point moves the center alone.
    """
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))  # half precision steps by 1/256 of the image
    if reference is None:
        return delta.sigmoid()
    start, known = inverse_sigmoid(reference), reference.shape[-1]
    if known < 4:
        return torch.cat([delta[..., :known] + start, delta[..., known:]], dim=-1).sigmoid()
    return (delta + start).sigmoid()


class Decoder(nn.Module):
    """Layers, the box update with its heads, and how a query's position follows from its reference.

    query_position  Mlp(4 -> C) of the reference, anew in every layer; None: the position in Queries stays
    norm            on every layer's features before the heads (DETR), or None
    norm_between    the next layer takes these features as well, and the last are normalized twice: so transformers
                    computes models with auxiliary_loss, and so they were trained; not in the papers
    spatial         (layer, content, reference, Queries.spatial) -> what cross-attention takes of the place in this
                    layer; None: Queries.spatial stays
    """

    def __init__(
        self,
        layers: list[nn.Module],
        boxes: BoxUpdate,
        query_position: nn.Module | None = None,
        norm: nn.Module | None = None,
        spatial: nn.Module | None = None,
        norm_between: bool = False,
    ) -> None:
        super().__init__()
        self.norm_between = norm_between and norm is not None
        self.layers, self.boxes = nn.ModuleList(layers), boxes
        self.query_position, self.norm, self.spatial = query_position, norm, spatial

    def forward(self, queries: Queries, memory: Memory, *, last_only: bool = False) -> Outputs:
        """Predictions of every layer; with `last_only`, of the last one (L = 1) and nothing that it does not need."""
        logits, boxes = [], []
        reference = before = queries.reference
        start = spatial = queries.spatial
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            position = queries.position
            if self.query_position is not None:
                position = in_float32(self.query_position, reference)  # type: ignore[arg-type]  # there is one with it
            if self.spatial is not None:
                spatial = self.spatial(index, queries.content, reference, start)
            queries = replace(queries, position=position, reference=reference, spatial=spatial)
            queries = replace(queries, content=layer(queries, memory))
            if self.norm_between:
                queries = replace(queries, content=self.norm(queries.content))  # type: ignore[misc]  # there is one
            features = queries.content if self.norm is None else self.norm(queries.content)
            shown = last or not last_only
            if shown:
                logits.append(self.boxes.classify(index, features))
                delta = self.boxes.delta(index, features)
                boxes.append(self.boxes.move(delta, before if self.boxes.twice else reference))
            if self.boxes.iterative and not last:
                # With a norm, the step to the next reference is taken from the features before it (DAB-DETR).
                step = delta if shown and self.norm is None else self.boxes.delta(index, queries.content)
                # The reference that the next layer samples around is a constant, whatever the loss reaches.
                before = self.boxes.move(step, reference)
                reference = before.detach()
        return Outputs(torch.stack(logits), torch.stack(boxes), encoder=queries.encoder)
