"""Box updates: class and box heads, and how a layer's box follows from them; see protocols.BoxUpdate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.box_ops import inverse_sigmoid
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear

DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)  # the head's x, y, w, h are divided by these (Sparse R-CNN)
LARGEST_GROWTH = math.log(100000 / 16)  # a side grows at most 6250 times, so that exp stays finite (Detectron)


class AbsoluteBoxes(nn.Module):
    """One pair of heads for all layers: the box straight from the features (DETR), or relative to a fixed reference."""

    def __init__(self, dim: int, logits: int, iterative: bool = False, box_layers: int = 3) -> None:
        """iterative  every layer moves the box of the layer before (DAB-DETR, section 4.3)"""
        super().__init__()
        self.iterative = self.look_forward_twice = iterative
        self.score, self.box = Linear(dim, logits), Mlp(dim, dim, 4, box_layers)

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K*]."""
        return in_float32(self.score, features)

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> box logits [B, N, 4], to be added to those of the reference where there is one."""
        return in_float32(self.box, features)

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        return move_by_logits(delta, reference)


class ExpDeltaBoxes(AbsoluteBoxes):
    """One pair of heads for all layers, whose boxes are all relative to the first reference and its size.

    Chen et al. 2024, "LW-DETR", section 3.1 (`bbox_reparam` and `lite_refpoint_refine` of its code): the center moves
    by fractions of the sides, and the sides grow by a factor.
    """

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        """delta, reference [B, N, 4] -> boxes [B, N, 4], cx, cy, w, h in 0..1, float32."""
        return move_by_deltas(delta, reference)


def move_by_deltas(delta: Tensor, reference: Tensor | None) -> Tensor:
    """The reference [B, N, 4] (cx, cy, w, h) moved by delta [B, N, 4] -> [B, N, 4], float32.

    x and y by fractions of the reference's sides, the sides by logarithmic growth. Boxes are not clipped to the image:
    a side that is cut off has no gradient. The runtime clips them.
    """
    if reference is None:
        raise ModelError("deltas move a box; this selector gives none")
    dtype = torch.promote_types(delta.dtype, torch.float32)
    shift, growth = delta.to(dtype).split(2, dim=-1)
    center, size = reference.to(dtype).split(2, dim=-1)
    return torch.cat([center + shift * size, size * growth.clamp(max=LARGEST_GROWTH).exp()], dim=-1)


class IterativeBoxes(nn.Module):
    """Each layer has its own heads and moves the box of the layer before (Deformable DETR, section 4.2)."""

    iterative = True

    def __init__(
        self, dim: int, logits: int, layers: int, look_forward_twice: bool = True, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.look_forward_twice = look_forward_twice
        self.score = nn.ModuleList(Linear(dim, logits) for _ in range(layers))
        self.box = nn.ModuleList(Mlp(dim, dim, 4, 3, activation=activation) for _ in range(layers))

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K]."""
        return in_float32(self.score[layer], features)

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> box logits [B, N, 4], to be added to those of the reference."""
        return in_float32(self.box[layer], features)

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        return move_by_logits(delta, reference)


def move_by_logits(delta: Tensor, reference: Tensor | None) -> Tensor:
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


class DeltaBoxes(nn.Module):
    """Each layer has its own towers and heads, and moves the box of the layer before relative to the box's size.

    Sun et al. 2021, "Sparse R-CNN", section 3; deltas as in Girshick et al. 2014, "R-CNN", appendix C.
    """

    iterative = True
    look_forward_twice = False

    def __init__(self, dim: int, logits: int, layers: int, class_tower: int, box_tower: int) -> None:
        """class_tower, box_tower  blocks of Linear, LayerNorm, ReLU before each head"""
        super().__init__()
        self.class_tower = nn.ModuleList(_tower(dim, class_tower) for _ in range(layers))
        self.box_tower = nn.ModuleList(_tower(dim, box_tower) for _ in range(layers))
        self.score = nn.ModuleList(Linear(dim, logits) for _ in range(layers))
        self.box = nn.ModuleList(Linear(dim, 4) for _ in range(layers))

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K]."""
        return in_float32(self.score[layer], self.class_tower[layer](features))

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> [B, N, 4], shift and logarithmic growth of the box, times DELTA_WEIGHTS."""
        return in_float32(self.box[layer], self.box_tower[layer](features))

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        """delta, reference [B, N, 4] -> boxes [B, N, 4], cx, cy, w, h in 0..1, float32."""
        dtype = torch.promote_types(delta.dtype, torch.float32)
        return move_by_deltas(delta.to(dtype) / delta.new_tensor(DELTA_WEIGHTS, dtype=dtype), reference)


def _tower(dim: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        *[module for _ in range(blocks) for module in (Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU())]
    )
