"""What the parts of a DetrModel hand to each other: Memory, Queries, Outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Memory:
    """The encoded image: one token per cell, level after level.

    tokens    [B, S, C]
    position  [1 or B, S, C] or None   added to queries and keys, never to values
    padding   [B, S] bool or None, True = padding
    shapes    [(H_l, W_l)] as Python ints, sum of H_l * W_l = S
    strides   input pixels per cell of each level
    valid     [B, L, 2] or None   fraction of each level's width and height that is image, 0..1 (x, y)
    axes      position of each column [1 or B, W, C] and of each row [1 or B, H, C], for row-column attention, or None
    """

    tokens: Tensor
    shapes: list[tuple[int, int]]
    strides: list[int]
    position: Tensor | None = None
    padding: Tensor | None = None
    valid: Tensor | None = None
    axes: tuple[Tensor, Tensor] | None = None

    def maps(self) -> list[Tensor]:
        """The tokens as maps, one [B, C, H_l, W_l] per level."""
        parts = self.tokens.split([h * w for h, w in self.shapes], dim=1)
        return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, self.shapes)]


@dataclass
class Queries:
    """The input of the decoder.

    content    [B, N, C]
    position   [1 or B, N, C] or None   where it is fixed for all layers
    reference  [1 or B, N, 2|4] or None, cx, cy(, w, h) in 0..1
    spatial    positions for cross-attention alone, or None: [1 or B, N, C] the sine of the center (conditional),
               [B, N, 2C] the position along x, then along y (row-column)
    self_mask  [N, N] bool or None, True = this query (row) must not see that one (column)
    encoder    (logits [B, N, K], boxes [B, N, 4]) of the proposals the queries came from, or None
    groups     the N queries are so many equal groups, which do not see each other; more than one in training alone
    """

    content: Tensor
    position: Tensor | None = None
    reference: Tensor | None = None
    spatial: Tensor | None = None
    self_mask: Tensor | None = None
    encoder: tuple[Tensor, Tensor] | None = None
    groups: int = 1


@dataclass
class Sides:
    """What the losses need of a decoder that predicts boxes by distributions of their sides (D-FINE).

    logits  [L, B, N, 4, R + 1]   left, top, right, bottom of every layer, over the bins
    start   [B, N, 4]             the boxes whose sides move, the same for all layers, without gradient
    first   (logits [B, N, K], boxes [B, N, 4]) of the plain head before the first layer's distributions
    values  [R + 1]               the movement W that each bin means, in box sides times scale
    scale   [1]
    """

    logits: Tensor
    start: Tensor
    first: tuple[Tensor, Tensor]
    values: Tensor
    scale: Tensor

    def of(self, queries: slice) -> Sides:
        """Those of some queries."""
        logits, boxes = self.first
        return Sides(
            self.logits[:, :, queries],
            self.start[:, queries],
            (logits[:, queries], boxes[:, queries]),
            self.values,
            self.scale,
        )


@dataclass
class Outputs:
    """Predictions of every decoder layer; the last of L are the detections.

    logits   [L, B, N, K*]
    boxes    [L, B, N, 4]  cx, cy, w, h in 0..1 of the input image
    encoder  (logits [B, M, K], boxes [B, M, 4]) of two-stage members, or None
    sides    of members whose boxes are distributions, or None; None also where only the last layer was asked for
    groups   the N queries, and the M proposals, are so many equal groups, each of which finds every object
    """

    logits: Tensor
    boxes: Tensor
    encoder: tuple[Tensor, Tensor] | None = None
    sides: Sides | None = None
    groups: int = 1


def flatten_maps(maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """One [B, C, H_l, W_l] per level -> tokens [B, S, C], level after level and row by row, and the levels' (H, W)."""
    tokens = [level.flatten(2).transpose(1, 2) for level in maps]
    return torch.cat(tokens, dim=1), [(level.shape[2], level.shape[3]) for level in maps]


def with_pos_embed(content: Tensor, position: Tensor | None) -> Tensor:
    """Content with its position added, where there is one."""
    return content if position is None else content + position
