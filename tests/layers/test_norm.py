"""RMSNorm is torch's own, and is computed in float32 where its input is not."""

from __future__ import annotations

import torch
from torch import nn

from edgedetr.layers.norm import RmsNorm


def test_it_equals_torchs_in_value_and_gradient() -> None:
    ours, theirs = RmsNorm(24), nn.RMSNorm(24, eps=1e-6)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(24) + 0.5)
        theirs.weight.copy_(ours.weight)
    x = torch.randn(2, 5, 24) * 3
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.square().mul(torch.arange(24)).sum().backward()
        results.append((y.detach(), leaf.grad, norm.weight.grad))
    for mine, wanted in zip(*results):
        torch.testing.assert_close(mine, wanted, atol=1e-3, rtol=1e-5)


def test_squares_beyond_float16_do_not_overflow() -> None:
    """300 squared is more than float16 holds; by hand: every channel is the root mean square itself."""
    assert torch.equal(RmsNorm(8).half()(torch.full((1, 8), 300.0).half()), torch.ones(1, 8).half())
