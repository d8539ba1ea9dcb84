"""Assigns one query to every object: the cheapest one-to-one assignment, for all layers and images at once.

Carion et al. 2020, "End-to-End Object Detection with Transformers", section 3.1, eq. 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou
from edgedetr.options import check
from edgedetr.training.data.dataset import PaddedTargets

UNUSABLE = 1e8  # cost of a NaN or infinite pair: chosen only where nothing else is left (scipy refuses NaN)


@dataclass(frozen=True)
class Costs:
    """Weights of the three costs, and the probability of the class cost."""

    form: Literal["softmax", "focal"]
    class_: float
    l1: float
    giou: float
    alpha: float = 0.25  # Deformable DETR's focal cost
    gamma: float = 2.0
    corners: bool = False  # L1 of x0, y0, x1, y1 instead of cx, cy, w, h

    def __post_init__(self) -> None:
        check(self, "costs", dict.fromkeys(("class_", "l1", "giou", "alpha", "gamma"), (0, math.inf)))


@dataclass(frozen=True)
class Assignment:
    """P pairs in each of G layers, ordered by image; an image has the same number of pairs in every layer.

    image   [P] int64       image of the pair
    query   [G, P] int64    query within the image
    target  [G, P] int64    object within the image
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def take(self, values: Tensor) -> Tensor:
        """values [G, B, N, ...] -> [G, P, ...], those of the matched queries."""
        layer = torch.arange(len(self.query), device=values.device)[:, None]
        return values[layer, self.image[None], self.query]

    def for_layers(self, layers: int) -> Assignment:
        """The pairs of the first layer, for so many layers."""
        return Assignment(self.image, self.query[:1].expand(layers, -1), self.target[:1].expand(layers, -1))


def match(predictions: Sequence[tuple[Tensor, Tensor]], padded: PaddedTargets, costs: Costs) -> list[Assignment]:
    """Assign objects to queries in every group of layers, with one copy from the device for all of them.

    predictions  groups of layers with equally many queries: logits [G, B, N, K*], boxes [G, B, N, 4] cx, cy, w, h
    """
    return [_packed(pairs, padded) for pairs in _match(predictions, padded, costs)]


def match_and_join(
    prediction: tuple[Tensor, Tensor], padded: PaddedTargets, costs: Costs
) -> tuple[Assignment, Assignment]:
    """The assignment of one group of layers, and its union over the layers: [1, P'].

    In the union, a query that any layer chose has the object that most layers gave it; of several, the first of the
    image (Peng et al. 2024, "D-FINE", section 4.2; the authors leave open which).
    """
    pairs = _match([prediction], padded, costs)[0]
    return _packed(pairs, padded), _packed(_union(pairs, padded, prediction[0].shape[2]), padded)


@dataclass(frozen=True)
class _Pairs:
    """An Assignment on the host."""

    image: np.ndarray
    query: np.ndarray
    target: np.ndarray


def _match(predictions: Sequence[tuple[Tensor, Tensor]], padded: PaddedTargets, costs: Costs) -> list[_Pairs]:
    with torch.no_grad():
        tables = [cost_table(logits, boxes, padded, costs) for logits, boxes in predictions]
        flat = torch.cat([table.flatten() for table in tables]).cpu().numpy()
    results, start = [], 0
    for table in tables:
        part = flat[start : start + table.numel()].reshape(table.shape)
        start += table.numel()
        results.append(_assign(part, padded))
    return results


def cost_table(logits: Tensor, boxes: Tensor, padded: PaddedTargets, costs: Costs) -> Tensor:
    """Cost of every query for every object: [G, B, N, T] float32."""
    logits, boxes = logits.float(), boxes.float()
    layers, _, queries, _ = logits.shape
    labels = padded.labels[None, :, None].expand(layers, -1, queries, -1)
    if costs.form == "softmax":
        # Probability, not log-probability, so that class and box costs have one scale (DETR, section 3.1).
        class_cost = -logits.softmax(-1).gather(-1, labels)
    else:
        prob = logits.sigmoid()
        positive = costs.alpha * (1 - prob) ** costs.gamma * -(prob + 1e-8).log()
        negative = (1 - costs.alpha) * prob**costs.gamma * -(1 - prob + 1e-8).log()
        class_cost = (positive - negative).gather(-1, labels)
    corners, wanted = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(padded.boxes)
    ours, theirs = (corners, wanted) if costs.corners else (boxes, padded.boxes)
    l1 = torch.cdist(ours, theirs[None].expand(layers, -1, -1, -1), p=1)
    giou = paired_giou(corners[:, :, :, None], wanted[None, :, None])
    table = costs.class_ * class_cost + costs.l1 * l1 - costs.giou * giou
    return table.nan_to_num(nan=UNUSABLE, posinf=UNUSABLE, neginf=UNUSABLE)


def _assign(table: np.ndarray, padded: PaddedTargets) -> _Pairs:
    """table [G, B, N, T]; the padding of an image gets no query."""
    image: list[int] = []
    query: list[list[int]] = [[] for _ in table]
    target: list[list[int]] = [[] for _ in table]
    for row, count in enumerate(padded.counts):
        for layer, costs in enumerate(table):
            rows, columns = linear_sum_assignment(costs[row, :, :count])
            query[layer] += rows.tolist()
            target[layer] += columns.tolist()
        image += [row] * len(rows)
    return _Pairs(*(np.asarray(numbers, dtype=np.int64) for numbers in (image, query, target)))


def _union(pairs: _Pairs, padded: PaddedTargets, queries: int) -> _Pairs:
    """See match_and_join."""
    images, objects = padded.labels.shape
    if not len(pairs.image):
        return _Pairs(pairs.image, pairs.query[:1], pairs.target[:1])
    chosen = np.zeros((images, queries, objects), dtype=np.int16)  # by how many layers
    np.add.at(chosen, (np.broadcast_to(pairs.image, pairs.query.shape), pairs.query, pairs.target), 1)
    image, query = np.nonzero(chosen.any(-1))
    return _Pairs(image, query[None], chosen[image, query].argmax(-1)[None])


def _packed(pairs: _Pairs, padded: PaddedTargets) -> Assignment:
    """On the device of the targets, by one copy."""
    device, layers = padded.labels.device, len(pairs.query)
    together = np.concatenate([pairs.image[None], pairs.query, pairs.target])
    packed = torch.from_numpy(together).to(device, non_blocking=True)
    return Assignment(packed[0], packed[1 : 1 + layers], packed[1 + layers :])
