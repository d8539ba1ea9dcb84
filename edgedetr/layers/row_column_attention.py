"""Row-column decoupled attention: one softmax over the columns of a map, one over its rows, instead of one over cells.

Wang et al. 2021, "Anchor DETR: Query Design for Transformer-Based Object Detection", section 3.4. A cell's weight is
the product of its column's and its row's weight, so there are H + W keys instead of H W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.feedforward import FeedForward, Mlp
from edgedetr.layers.linear import Linear
from edgedetr.layers.position import sine

Axes = tuple[Tensor, Tensor]  # position of each column [1 or B, W, C], and of each row [1 or B, H, C]

LARGEST = 2**25  # largest size of the inner product of one image (128 MiB); larger ones are split


class AxisPosition(nn.Module):
    """A learned embedding of a position along one axis; the same network for columns, rows and query points."""

    shape_only = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.adapt = dim, Mlp(dim, dim, dim, 2)

    def along(self, positions: Tensor) -> Tensor:
        """positions [..., P] in 0..1 -> [..., P, C]."""
        return self.adapt(sine(positions[..., None], self.dim))

    def forward(self, like: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Axes:
        """Embeddings of a map's columns and rows: cell centers, as fractions of the columns and rows that are image.

        padding  [B, H, W] bool; each image is in the upper left corner
        """
        kind = torch.promote_types(like.dtype, torch.float32)  # bfloat16 would move a cell center by up to 1/256
        if padding is None:
            height, width = (torch.ones(1, n, device=like.device, dtype=kind) for n in shape)
        else:
            height, width = (~padding[:, :, 0]).to(kind), (~padding[:, 0, :]).to(kind)
        x, y = ((seen.cumsum(1) - 0.5) / seen.sum(1, keepdim=True).clamp(min=1) for seen in (width, height))
        return self.along(x), self.along(y)


class RowColumnAttention(nn.Module):
    """sum_h a_y[h] sum_w a_x[w] v[h, w], per head; a_x and a_y are softmaxes over the mean of each column and row."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be split over {heads} heads; expected a multiple")
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q_x, self.q_y, self.k_x, self.k_y, self.v, self.out = (Linear(dim, dim) for _ in range(6))
        self.dropout = nn.Dropout(dropout)
        for projection in (self.q_x, self.q_y, self.k_x, self.k_y, self.v, self.out):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        along_x: Tensor,
        along_y: Tensor,
        tokens: Tensor,
        axes: Axes,
        shape: tuple[int, int],
        padding: Tensor | None = None,
    ) -> Tensor:
        """One weighted sum of values per query.

        along_x, along_y  [B, N, C]   content + position along x (compared with columns), and along y (with rows)
        tokens            [B, H*W, C] row by row, without position; axes: position of columns and rows
        padding           [B, H*W] bool, True = padding: outside the image's columns and rows
        return            [B, N, C]
        """
        height, width = shape
        maps = tokens.unflatten(1, shape)  # [B, H, W, C]
        hidden_x = hidden_y = None
        if padding is None:
            columns, rows = maps.mean(1), maps.mean(2)
        else:
            seen = ~padding.unflatten(1, shape)
            hidden_x, hidden_y = (~seen.any(1))[:, None, None], (~seen.any(2))[:, None, None]
            # The mean over the image's cells only. (The paper's code includes padding, which changes the result.)
            maps = maps * seen[..., None]
            columns = maps.sum(1) / seen.sum(1)[..., None].clamp(min=1)
            rows = maps.sum(2) / seen.sum(2)[..., None].clamp(min=1)
        # Projection after the mean gives the same result as before it, with fewer vectors.
        a_x = self._weights(self.q_x(along_x), self.k_x(columns + axes[0]), hidden_x)  # [B, M, N, W]
        a_y = self._weights(self.q_y(along_y), self.k_y(rows + axes[1]), hidden_y)  # [B, M, N, H]
        value = self.v(tokens).unflatten(1, shape).unflatten(-1, (self.heads, -1))  # [B, H, W, M, D]
        if width > height:  # the longer axis first: the intermediate result is smaller
            first, second, value = a_x, a_y, value.permute(0, 3, 2, 1, 4)  # [B, M, W, H, D]
        else:
            first, second, value = a_y, a_x, value.permute(0, 3, 1, 2, 4)  # [B, M, H, W, D]
        return self.out(_contract(first, second, value).transpose(1, 2).flatten(2))

    def _weights(self, query: Tensor, key: Tensor, hidden: Tensor | None) -> Tensor:
        """query [B, N, C], key [B, P, C] -> [B, M, N, P]."""
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query * self.scale, key))
        scores = q @ k.transpose(-1, -2)
        if hidden is not None:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self.dropout(scores.softmax(-1))


def _contract(first: Tensor, second: Tensor, value: Tensor) -> Tensor:
    """first [B, M, N, P], second [B, M, N, R], value [B, M, P, R, D] -> [B, M, N, D], in parts of the queries."""
    heads, queries = first.shape[1:3]
    short, width = value.shape[3:]
    rows = value.flatten(3)  # [B, M, P, R D]
    at_once = max(LARGEST // (heads * short * width), 1)
    if queries <= at_once:
        return _part(first, second, rows, short)
    parts = zip(first.split(at_once, dim=2), second.split(at_once, dim=2))
    return torch.cat([_part(a, b, rows, short) for a, b in parts], dim=2)


def _part(first: Tensor, second: Tensor, rows: Tensor, short: int) -> Tensor:
    between = (first @ rows).unflatten(-1, (short, -1))  # [B, M, N, R, D]
    return (second.unsqueeze(-2) @ between).squeeze(-2)


class RowColumnLayer(nn.Module):
    """An encoder layer: row-column self-attention and feed-forward, a LayerNorm after each."""

    def __init__(self, attention: RowColumnAttention, feedforward: FeedForward, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.feedforward = attention, feedforward
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.path = nn.Dropout(dropout), DropPath()

    def forward(self, tokens: Tensor, axes: Axes, shape: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """tokens [B, H*W, C], padding [B, H*W] (True = padding) -> [B, H*W, C]."""
        maps, (x, y) = tokens.unflatten(1, shape), axes
        along_x, along_y = (maps + x[:, None]).flatten(1, 2), (maps + y[:, :, None]).flatten(1, 2)
        tokens = tokens + self.path(self.dropout(self.attention(along_x, along_y, tokens, axes, shape, padding)))
        tokens = self.attention_norm(tokens)
        return self.feedforward_norm(tokens + self.path(self.feedforward(tokens)))
