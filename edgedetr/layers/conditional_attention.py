"""Conditional attention: content and place are projected apart, so that each head can look at a place alone.

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

# Side of a box in 0..1 that the spatial query divides by at least: less than a pixel of any input up to 1024, and a
# quotient that float16 holds (1 / 1e-5 is infinite there, and infinity times a sine of 0 is NaN).
SMALLEST = 2.0**-10


class ConditionalSelfAttention(nn.Module):
    """Among queries; content and position have projections of their own, which are summed."""

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
        mixed = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ConditionalAttention(nn.Module):
    """Queries to tokens; each head compares content with content and, beside it, place with place.

    first   layer 0 also adds the queries' position to their content, and the tokens' to theirs: there is no content yet
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
        place: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One sum of values per query.

        content   [B, N, C];  position [1 or B, N, C], used by the first layer only
        spatial   [1 or B, N, C]   the sine of the query's center, as scaled by SpatialQuery
        tokens    [B, S, C];  place [1 or B, S, C], their position
        padding   [B, S] bool, True = not to be seen
        """
        q, k, where = self.q(content), self.k(tokens), self.k_position(place)
        if self.q_position is not None:
            q, k = q + self.q_position(position), k + where
        where, looked = where.expand(k.shape[0], -1, -1), self.q_spatial(spatial)
        shared, batch = looked.shape[0], q.shape[0]
        # One place for all images is repeated; a batch that a graph leaves open is no int, and never compared with 1.
        if type(shared) is not type(batch) or shared != batch:
            looked = looked.expand(batch, -1, -1)
        q = torch.cat([_split(q, self.heads), _split(looked, self.heads)], dim=-1)  # [B, M, N, 2D]
        k = torch.cat([_split(k, self.heads), _split(where, self.heads)], dim=-1)  # [B, M, S, 2D]
        mask = None if padding is None else padding[:, None, None]
        v = _split(self.v(tokens), self.heads)
        mixed = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SpatialQuery(nn.Module):
    """Where each head looks: the sine of the query's center, scaled channel by channel by what the query has become.

    One module for all layers; the first takes the sine as it is, because its queries know nothing yet.
    """

    def __init__(self, dim: int, sized: bool = False) -> None:
        """sized  also scaled by (side that the content asks for) / (side of the reference box), per axis (DAB-DETR)"""
        super().__init__()
        self.per_axis = dim // 2
        self.scale = Mlp(dim, dim, dim, 2)
        self.size = Mlp(dim, dim, 2, 2) if sized else None

    def forward(self, layer: int, content: Tensor, reference: Tensor, spatial: Tensor | None = None) -> Tensor:
        """content [B, N, C], reference [1 or B, N, 2|4] in 0..1 -> [B, N, C]; in layer 0 as many as there are places.

        spatial  the center's sine [1 or B, N, C], where known
        """
        place = sine_of_boxes(reference[..., :2], self.per_axis) if spatial is None else spatial
        if layer > 0:
            place = place * self.scale(content)
        if self.size is None:
            return place
        wanted = self.size(content).sigmoid()  # w, h
        ratio = wanted / reference[..., 2:].clamp(min=SMALLEST)
        ratio = torch.stack([ratio[..., 1], ratio[..., 0]], dim=-1)  # y first, as the sine
        return (place.unflatten(-1, (2, self.per_axis)) * ratio[..., None]).flatten(-2)


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
