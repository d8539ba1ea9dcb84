"""Boxes as tensors agree with the numpy contract, with loops, and stay finite where division could fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgedetr import boxes as reference
from edgedetr.layers.box_ops import cxcywh_to_xyxy, inverse_sigmoid, paired_giou, paired_iou


def some_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    low = rng.random((count, 2)) * 0.7
    return np.concatenate([low, low + rng.random((count, 2)) * 0.3], axis=1)


def giou_of_one_pair(a: np.ndarray, b: np.ndarray) -> float:
    """Straight from the definition: IoU minus the fraction of the hull that neither covers."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def test_forms_and_iou_agree_with_numpy(rng: np.random.Generator) -> None:
    a, b = some_boxes(rng, 7), some_boxes(rng, 5)
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(cxcywh_to_xyxy(torch.from_numpy(reference.xyxy_to_cxcywh(a))).numpy(), a, atol=1e-12)
    np.testing.assert_allclose(paired_iou(ta[:, None], tb[None]).numpy(), reference.iou(a, b), atol=1e-12)


def test_giou_equals_its_definition(rng: np.random.Generator) -> None:
    a, b = some_boxes(rng, 6), some_boxes(rng, 4)
    expected = [[giou_of_one_pair(x, y) for y in b] for x in a]
    every_pair = paired_giou(torch.from_numpy(a)[:, None], torch.from_numpy(b)[None])
    np.testing.assert_allclose(every_pair.numpy(), expected, atol=1e-12)


def test_paired_forms_are_the_diagonal(rng: np.random.Generator) -> None:
    a, b = torch.from_numpy(some_boxes(rng, 6)), torch.from_numpy(some_boxes(rng, 6))
    assert torch.equal(paired_iou(a, b), paired_iou(a[:, None], b[None]).diagonal())
    assert torch.equal(paired_giou(a, b), paired_giou(a[:, None], b[None]).diagonal())


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([0.0, 0, 1, 1], [0.0, 0, 1, 1], 1.0),
        ([0.0, 0, 1, 1], [1.0, 0, 2, 1], 0.0),  # side by side: no overlap, nothing of the hull is empty
        ([0.0, 0, 1, 1], [2.0, 0, 3, 1], -1 / 3),  # a third of the hull is empty
    ],
)
def test_giou_of_hand_worked_pairs(a: list[float], b: list[float], expected: float) -> None:
    assert paired_giou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-6)


def test_boxes_without_area_give_finite_values_and_gradients() -> None:
    point = torch.tensor([[0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    value = paired_giou(point, point.detach().clone()) + paired_iou(point, point.detach().clone())
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(point.grad).all()


def test_inverse_sigmoid_inverts_and_is_finite_at_the_ends() -> None:
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64))
    limit = float(np.log(1e5))  # 1 / eps
    torch.testing.assert_close(ends, torch.tensor([-limit, -limit, limit, limit], dtype=torch.float64))
