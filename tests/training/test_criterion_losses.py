"""Label smoothing against hand-worked sums; without it, the losses do not change."""

from __future__ import annotations

import math

import pytest
import torch

from edgedetr.training.criterion import focal, iou_aware_bce, matchability, softmax_ce, varifocal

LOGITS = torch.tensor([[[[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]]]])  # [1, 1, 2, 3]: two classes and none


def test_smoothed_cross_entropy_spreads_over_all_classes_by_their_weights() -> None:
    labels, light, fraction = torch.tensor([[[0, 2]]]), 0.1, 0.2
    weights, total = (1.0, 1.0, light), 0.0
    for query, label in enumerate((0, 2)):
        log = LOGITS[0, 0, query].log_softmax(-1).tolist()
        total += -(1 - fraction) * weights[label] * log[label]
        total += sum(-fraction / 3 * w * value for w, value in zip(weights, log))
    expected = total / (weights[0] + weights[2])
    assert float(softmax_ce(LOGITS, labels, light, fraction)[0]) == pytest.approx(expected, rel=1e-6)
    assert float(softmax_ce(LOGITS, labels, light)[0]) != pytest.approx(expected, rel=1e-3)


def test_smoothed_focal_moves_the_targets_of_matched_queries_alone() -> None:
    onehot, alpha, gamma, fraction = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]]), 0.25, 2.0, 0.1
    expected = 0.0
    for query in range(2):
        for label in range(3):
            x, hard = float(LOGITS[0, 0, query, label]), float(onehot[0, 0, query, label])
            p = 1 / (1 + math.exp(-x))
            target = hard * (1 - fraction) + fraction / 2 if query == 0 else 0.0
            bce = -(target * math.log(p) + (1 - target) * math.log(1 - p))
            expected += (alpha * (1 - p) ** gamma if hard else (1 - alpha) * p**gamma) * bce
    assert float(focal(LOGITS, onehot, alpha, gamma, fraction)[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["vfl", "mal"])
def test_smoothed_varifocal_and_matchability_move_the_targets_of_matched_queries_alone(name) -> None:
    onehot, quality = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]]), torch.tensor([[[0.7, 0.0]]])
    alpha, gamma, fraction, expected = 0.75, 1.5, 0.1, 0.0
    for query in range(2):
        q = float(quality[0, 0, query]) ** (gamma if name == "mal" else 1)
        for label in range(3):
            x, hard = float(LOGITS[0, 0, query, label]), float(onehot[0, 0, query, label])
            p = 1 / (1 + math.exp(-x))
            target = q * (hard * (1 - fraction) + fraction / 2) if query == 0 else 0.0
            bce = -(target * math.log(p) + (1 - target) * math.log(1 - p))
            weight = (q if name == "vfl" else 1.0) if hard else (alpha if name == "vfl" else 1.0) * p**gamma
            expected += weight * bce

    def loss(smoothing):
        if name == "vfl":
            return float(varifocal(LOGITS, onehot, quality, alpha, gamma, smoothing)[0])
        return float(matchability(LOGITS, onehot, quality, gamma, smoothing)[0])

    assert loss(fraction) == pytest.approx(expected, rel=1e-6)
    assert loss(0.0) != pytest.approx(expected, rel=1e-3)


def test_smoothed_iou_aware_bce_moves_the_targets_of_matched_queries_alone() -> None:
    onehot, quality = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]]), torch.tensor([[[0.7, 0.0]]])
    alpha, gamma, fraction, expected = 0.25, 2.0, 0.1, 0.0
    probabilities = [[1 / (1 + math.exp(-float(x))) for x in row] for row in LOGITS[0, 0]]
    learned = probabilities[0][1] ** alpha * 0.7 ** (1 - alpha)
    for query in range(2):
        for label in range(3):
            p, hard = probabilities[query][label], float(onehot[0, 0, query, label])
            target = learned * (hard * (1 - fraction) + fraction / 2) if query == 0 else 0.0
            expected -= target * math.log(p) + (1 - target if hard else p**gamma) * math.log(1 - p)
    assert float(iou_aware_bce(LOGITS, onehot, quality, alpha, gamma, fraction)[0]) == pytest.approx(expected, rel=1e-6)
    assert float(iou_aware_bce(LOGITS, onehot, quality, alpha, gamma)[0]) != pytest.approx(expected, rel=1e-3)


def test_a_matched_query_with_no_overlap_still_learns_a_hundredth() -> None:
    onehot, quality = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]]), torch.zeros(1, 1, 2)
    logits = LOGITS.clone().requires_grad_()
    iou_aware_bce(logits, onehot, quality, 0.25, 2.0).sum().backward()
    # d/dx of -t log p - (1 - t) log(1 - p) is p - t.
    assert float(logits.grad[0, 0, 0, 1]) == pytest.approx(0.5 - 0.01, abs=1e-6)
