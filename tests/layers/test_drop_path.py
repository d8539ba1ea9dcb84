"""Stochastic depth: right in expectation, per image, deeper is more, and nothing in evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgedetr.layers.drop_path import DropPath, rate_at, set_rates


def test_a_branch_is_dropped_for_a_whole_image_or_scaled_up() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 3, 2))
    values = out.flatten(1)
    assert (values == values[:, :1]).all(), "one decision per image"
    assert values[:, 0].unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    # Expectation 1; the mean of 4000 of these has a standard deviation of 0.009.
    assert float(values[:, 0].mean()) == pytest.approx(1, abs=0.04)


def test_evaluation_passes_the_branch_itself() -> None:
    x = torch.randn(2, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


def test_schedules_run_from_zero_to_the_highest_and_the_exponential_one_starts_later() -> None:
    for schedule in ("linear", "exponential"):
        assert rate_at(0, 0.3, schedule) == 0
        assert rate_at(1, 0.3, schedule) == pytest.approx(0.3)
    assert rate_at(0.5, 0.3, "linear") == pytest.approx(0.15)
    assert rate_at(0.5, 0.3, "exponential") == pytest.approx(0.3 * (math.e**0.5 - 1) / (math.e - 1))


def test_blocks_get_their_rates_in_order_and_share_them_within() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = DropPath(), DropPath()

    net = nn.Sequential(Block(), nn.Linear(2, 2), Block(), Block())
    assert set_rates(net, 0.2, "linear") == pytest.approx((0.0, 0.1, 0.2))
    assert [(b.first.rate, b.second.rate) for b in net if isinstance(b, Block)] == [
        (0.0, 0.0),
        (pytest.approx(0.1), pytest.approx(0.1)),
        (pytest.approx(0.2), pytest.approx(0.2)),
    ]
    assert set_rates(nn.Sequential(Block()), 0.3, "exponential") == (0.3,), "a single block is the last"
    assert set_rates(nn.Linear(2, 2), 0.3, "linear") == ()
