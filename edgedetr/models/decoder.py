"""The decoder: queries attend to each other and to the memory, layer by layer, and every layer predicts boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.conditional_attention import ConditionalSelfAttention
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.feedforward import FeedForward, GatedFeedForward
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.gate import Gate
from edgedetr.models.cross_attention import DeformableCrossAttention
from edgedetr.models.protocols import BoxState, BoxUpdate, CrossAttention, StatefulBoxUpdate
from edgedetr.models.records import Memory, Outputs, Queries, with_pos_embed

SelfAttention = MultiHeadAttention | ConditionalSelfAttention


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; a norm after (post) or before (pre) each."""

    cross_attention: CrossAttention

    def __init__(
        self,
        self_attention: SelfAttention | None,
        cross_attention: CrossAttention,
        feedforward: FeedForward | GatedFeedForward,
        dim: int,
        dropout: float = 0.0,
        pre_norm: bool = False,
        gate: Gate | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        """self_attention  None: none in this layer, as may be in the first, whose queries have no content yet
        gate            joins the content with what cross-attention read, in place of their sum and its norm (post-norm)
        norm            makes a normalization of so many channels
        """
        super().__init__()
        self.self_attention, self.cross_attention, self.feedforward = self_attention, cross_attention, feedforward
        self.self_norm = None if self_attention is None else norm(dim)
        self.cross_norm = norm(dim) if gate is None else None
        self.gate, self.feedforward_norm = gate, norm(dim)
        self.dropout, self.path, self.pre_norm = nn.Dropout(dropout), DropPath(), pre_norm

    def forward(self, queries: Queries, memory: Memory) -> Tensor:
        """-> the new content [B, N, C]."""
        content = queries.content
        if self.self_attention is not None and self.self_norm is not None:
            inner = self.self_norm(content) if self.pre_norm else content
            content = content + self.path(self.dropout(_self_attend(self.self_attention, inner, queries)))
            content = content if self.pre_norm else self.self_norm(content)
        content = self._cross_attend(content, queries, memory)
        if self.pre_norm:
            return content + self.path(self.feedforward(self.feedforward_norm(content)))
        return self.feedforward_norm(content + self.path(self.feedforward(content)))

    def _cross_attend(self, content: Tensor, queries: Queries, memory: Memory) -> Tensor:
        """The content [B, N, C], joined with what it reads in the memory."""
        inner = self.cross_norm(content) if self.pre_norm and self.cross_norm is not None else content
        read = self.dropout(self.cross_attention(replace(queries, content=inner), memory))
        if self.gate is not None:
            joined: Tensor = self.gate(content, read, self.path)
            return joined
        content = content + self.path(read)
        return content if self.pre_norm or self.cross_norm is None else self.cross_norm(content)


def deformable_decoder_layers(
    count: int,
    dim: int,
    heads: int,
    points: Sequence[int],
    feedforward: Callable[[], FeedForward],
    sampling: str = "auto",
    dropout: float = 0.0,
    method: str = "default",
) -> list[nn.Module]:
    """`count` layers whose queries sample the memory; points: samples per head in each level."""
    return [
        DecoderLayer(
            MultiHeadAttention(dim, heads, dropout),
            DeformableCrossAttention(dim, heads, points, sampling, method),
            feedforward(),
            dim,
            dropout,
        )
        for _ in range(count)
    ]


def _self_attend(attention: SelfAttention, content: Tensor, queries: Queries) -> Tensor:
    """Self-attention of the content [B, N, C], with the position added to it or projected separately.

    Each group of queries attends to itself (Chen et al. 2023, "Group DETR", section 3.2).
    """
    if isinstance(attention, ConditionalSelfAttention):
        if queries.position is None:
            raise ModelError("conditional self-attention projects the position separately; this decoder gives none")
        return attention(content, queries.position, queries.self_mask)
    query = with_pos_embed(content, queries.position)
    if queries.groups == 1:
        return attention(query, query, content, queries.self_mask)
    # A group is a batch element of its own: attention over 13 x 300 queries would be 13 times the work.
    apart = (x.unflatten(1, (queries.groups, -1)).flatten(0, 1) for x in (query, content))
    query, content = apart
    return attention(query, query, content, queries.self_mask).unflatten(0, (-1, queries.groups)).flatten(1, 2)


class Decoder(nn.Module):
    """Layers, the box update with its heads, and how a query's position follows from its reference.

    query_position  Mlp(4 -> C) of the reference, anew in every layer; None: the position in Queries stays
    norm            on every layer's features before the heads (DETR), or None
    norm_between    the next layer takes these features as well, and the last are normalized twice: transformers
                    computes models with auxiliary_loss this way, as they were trained; not in the papers
    spatial         (layer, content, reference, Queries.spatial) -> this layer's positions for cross-attention alone;
                    None: Queries.spatial stays
    position_once   the first layer's position serves all layers (DEIMv2)
    """

    boxes: BoxUpdate | StatefulBoxUpdate

    def __init__(
        self,
        layers: list[nn.Module],
        boxes: BoxUpdate | StatefulBoxUpdate,
        query_position: nn.Module | None = None,
        norm: nn.Module | None = None,
        spatial: nn.Module | None = None,
        norm_between: bool = False,
        position_once: bool = False,
    ) -> None:
        super().__init__()
        self.norm_between, self.position_once = norm_between, position_once
        self.layers, self.boxes = nn.ModuleList(layers), boxes
        self.query_position, self.norm, self.spatial = query_position, norm, spatial

    def forward(self, queries: Queries, memory: Memory, *, last_only: bool = False) -> Outputs:
        """Predictions of every layer; with `last_only` of the last one alone (L = 1), and only what it depends on."""
        heads = self.boxes
        if isinstance(heads, StatefulBoxUpdate):
            return self._with_state(heads, queries, memory, last_only)
        logits, boxes = [], []
        reference = before = queries.reference
        start = queries.spatial
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            queries = self._placed(index, queries, reference, start)
            queries = replace(queries, content=layer(queries, memory))
            if self.norm is not None and self.norm_between:
                queries = replace(queries, content=self.norm(queries.content))
            features = queries.content if self.norm is None else self.norm(queries.content)
            shown = last or not last_only
            if shown:
                logits.append(heads.classify(index, features))
                delta = heads.delta(index, features)
                boxes.append(heads.move(delta, before if heads.look_forward_twice else reference))
            if heads.iterative and not last:
                # With a norm, the step to the next reference is taken from the features before it (DAB-DETR).
                step = delta if shown and self.norm is None else heads.delta(index, queries.content)
                # The reference that the next layer samples around is a constant, whatever the loss reaches.
                before = heads.move(step, reference)
                reference = before.detach()
        return Outputs(torch.stack(logits), torch.stack(boxes), encoder=queries.encoder, groups=queries.groups)

    def _placed(self, index: int, queries: Queries, reference: Tensor | None, start: Tensor | None) -> Queries:
        """The queries as a layer gets them, with their positions; start: Queries.spatial of the first layer."""
        position, spatial = queries.position, queries.spatial
        if self.query_position is not None and (index == 0 or not self.position_once):
            if reference is None:
                raise ModelError("the query position is computed from a reference; this selector gives none")
            position = in_float32(self.query_position, reference)
        if self.spatial is not None:
            spatial = self.spatial(index, queries.content, reference, start)
        return replace(queries, position=position, reference=reference, spatial=spatial)

    def _with_state(self, heads: StatefulBoxUpdate, queries: Queries, memory: Memory, last_only: bool) -> Outputs:
        """The same for boxes with a state; each layer's features go to the heads as they are."""
        states: list[BoxState] = []
        reference, start = queries.reference, queries.spatial
        for index, layer in enumerate(self.layers):
            queries = self._placed(index, queries, reference, start)
            queries = replace(queries, content=layer(queries, memory))
            shown = not last_only or index == len(self.layers) - 1
            states.append(heads.refine(index, queries.content, reference, states[-1] if states else None, shown=shown))
            reference = states[-1].boxes.detach()
        shown_states = states[-1:] if last_only else states
        logits = torch.stack([state.logits for state in shown_states if state.logits is not None])
        boxes = torch.stack([state.boxes for state in shown_states])
        return Outputs(logits, boxes, encoder=queries.encoder, sides=None if last_only else heads.sides(states))
