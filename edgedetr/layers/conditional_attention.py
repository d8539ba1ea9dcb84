"""Conditional attention: content and position have separate projections, so that a head can attend by position only.

Meng et al. 2021, "Conditional DETR for Fast Training Convergence", section 3.3; the size in the spatial query is
DAB-DETR's (Liu et al. 2022, section 4.4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgedetr.layers.attention import attend
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.linear import Linear
from edgedetr.layers.position import sine_of_boxes

# Smallest side of a box in 0..1 that the spatial query divides by: less than a pixel of any input up to 1024, and a
# quotient that float16 holds (1 / 1e-5 is infinite there, and infinity times a sine of 0 is NaN).
SMALLEST = 2.0**-10


class ConditionalSelfAttention(nn.Module):
    """Self-attention of queries; content and position have separate projections, which are summed."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.q_position, self.k, self.k_position, self.v, self.out = _linears(dim, heads, 6)
        self.dropout = dropout  # of the weights, while training

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """content [B, N, C], position [1 or B, N, C] -> [B, N, C].

        mask  [N, N] bool, True = this row must not see that column
        """
        q = self.q(content) + self.q_position(position)
        k = self.k(content) + self.k_position(position)
        q, k, v = (_split(x, self.heads) for x in (q, k, self.v(content)))
        attended = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))


class ConditionalAttention(nn.Module):
    """Cross-attention of queries to tokens; each head compares content with content and position with position.

    first   layer 0 also adds the queries' position to their content, and the tokens' to theirs: it has no content yet
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, first: bool = False) -> None:
        super().__init__()
        self.heads, self.scale = heads, (2 * dim // heads) ** -0.5
        self.q, self.q_spatial, self.k, self.k_position, self.v, self.out = _linears(dim, heads, 6)
        self.q_position = _linears(dim, heads, 1)[0] if first else None
        self.dropout = dropout  # of the weights, while training

    def forward(
        self,
        content: Tensor,
        position: Tensor | None,
        spatial: Tensor,
        tokens: Tensor,
        token_position: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One weighted sum of values per query.

        content   [B, N, C];  position [1 or B, N, C], used by the first layer only
        spatial   [1 or B, N, C]   the sine of the query's center, as scaled by SpatialQuery
        tokens    [B, S, C];  token_position [1 or B, S, C]
        padding   [B, S] bool, True = not attended to
        """
        q, k, k_position = self.q(content), self.k(tokens), self.k_position(token_position)
        if self.q_position is not None:
            q, k = q + self.q_position(position), k + k_position
        k_position, q_spatial = k_position.expand(k.shape[0], -1, -1), self.q_spatial(spatial)
        shared, batch = q_spatial.shape[0], q.shape[0]
        # One position for all images is repeated; a dynamic batch of a graph is no int, and is never compared with 1.
        if type(shared) is not type(batch) or shared != batch:
            q_spatial = q_spatial.expand(batch, -1, -1)
        q = torch.cat([_split(q, self.heads), _split(q_spatial, self.heads)], dim=-1)  # [B, M, N, 2D]
        k = torch.cat([_split(k, self.heads), _split(k_position, self.heads)], dim=-1)  # [B, M, S, 2D]
        mask = None if padding is None else padding[:, None, None]
        v = _split(self.v(tokens), self.heads)
        attended = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))


class SpatialQuery(nn.Module):
    """The spatial query: the sine of the query's center, scaled per channel by a function of the query's content.

    One module for all layers; layer 0 does not scale, because its queries have no content yet.
    """

    def __init__(self, dim: int, sized: bool = False) -> None:
        """sized  also scaled by (side predicted from the content) / (side of the reference box), per axis (DAB-DETR)"""
        super().__init__()
        self.per_axis = dim // 2
        self.scale = Mlp(dim, dim, dim, 2)
        self.size = Mlp(dim, dim, 2, 2) if sized else None

    def forward(self, layer: int, content: Tensor, reference: Tensor, spatial: Tensor | None = None) -> Tensor:
        """content [B, N, C], reference [1 or B, N, 2|4] in 0..1 -> [B, N, C]; [1 or B, N, C] in layer 0.

        spatial  the center's sine [1 or B, N, C], if known
        """
        query = sine_of_boxes(reference[..., :2], self.per_axis) if spatial is None else spatial
        if layer > 0:
            query = query * self.scale(content)
        if self.size is None:
            return query
        predicted = self.size(content).sigmoid()  # w, h
        ratio = predicted / reference[..., 2:].clamp(min=SMALLEST)
        ratio = torch.stack([ratio[..., 1], ratio[..., 0]], dim=-1)  # y first, as in the sine
        return (query.unflatten(-1, (2, self.per_axis)) * ratio[..., None]).flatten(-2)


def _linears(dim: int, heads: int, count: int) -> list[Linear]:
    if dim % heads:
        raise ValueError(f"{dim} channels cannot be split over {heads} heads; expected a multiple")
    linears = [Linear(dim, dim) for _ in range(count)]
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linears


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, M, N, D]
