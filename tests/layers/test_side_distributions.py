"""Sides of boxes as distributions, against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from edgedetr.layers.side_distributions import SideBins, SideIntegral, SideQuality, bin_values


@pytest.mark.parametrize("up, scale, bins", [(0.5, 4.0, 32), (0.5, 8.0, 32), (0.7, -3.0, 8)])
def test_bins_are_densest_at_the_middle_and_end_at_twice_the_fine_range(up: float, scale: float, bins: int) -> None:
    values = bin_values(torch.tensor([up]), torch.tensor([scale]), bins).tolist()
    largest = abs(up * scale)
    step = (largest + 1) ** (2 / (bins - 2))
    half = bins // 2
    right = [step**i - 1 for i in range(1, half)]
    expected = [-2 * largest, *[-x for x in reversed(right)], 0.0, *right, 2 * largest]
    assert values == pytest.approx(expected, abs=1e-5)
    assert values[-2] == pytest.approx(largest, abs=1e-5), "the last bin but one is the fine range's end"
    widths = [b - a for a, b in zip(values[half:], values[half + 1 :])]
    assert widths == sorted(widths)


def test_moved_boxes_are_those_of_every_side_moved_on_its_own() -> None:
    torch.manual_seed(0)
    bins, scale = 8, 3.0
    sides, start = torch.randn(2, 5, 4 * (bins + 1)), torch.rand(2, 5, 4)
    constants = SideBins(bins, 0.5, scale)
    probability, boxes = SideIntegral()(sides, constants(), start)
    values = constants.values().tolist()
    for image in range(2):
        for query in range(5):
            moved = []
            for side in range(4):
                logits = sides[image, query, side * (bins + 1) : (side + 1) * (bins + 1)].tolist()
                weights = [math.exp(x) for x in logits]
                assert probability[image, query, side].tolist() == pytest.approx([w / sum(weights) for w in weights])
                moved.append(sum(w * v for w, v in zip(weights, values)) / sum(weights))
            cx, cy, w, h = start[image, query].tolist()
            x0, y0 = cx - (0.5 * scale + moved[0]) * w / scale, cy - (0.5 * scale + moved[1]) * h / scale
            x1, y1 = cx + (0.5 * scale + moved[2]) * w / scale, cy + (0.5 * scale + moved[3]) * h / scale
            expected = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            assert boxes[image, query].tolist() == pytest.approx(expected, abs=1e-5)  # float32


def test_distributions_that_say_nothing_leave_the_box_where_it_is() -> None:
    start = torch.rand(1, 3, 4)
    _, boxes = SideIntegral()(torch.zeros(1, 3, 4 * 33), SideBins(32, 0.5, 4.0)(), start)
    torch.testing.assert_close(boxes, start, atol=1e-6, rtol=0)


def test_quality_sees_the_largest_probabilities_of_each_side_and_their_mean() -> None:
    torch.manual_seed(0)
    quality = SideQuality(top=2, hidden=3)
    assert quality(torch.rand(1, 2, 4, 9)).abs().max() == 0, "it starts without a say"
    for parameter in quality.parameters():
        parameter.data.normal_()
    probability = torch.randn(1, 1, 4, 9).softmax(-1)
    seen = []
    for side in probability[0, 0].tolist():
        best = sorted(side, reverse=True)[:2]
        seen += [*best, sum(best) / 2]
    expected = quality.confidence(torch.tensor(seen))
    torch.testing.assert_close(quality(probability)[0, 0], expected, atol=1e-6, rtol=0)
