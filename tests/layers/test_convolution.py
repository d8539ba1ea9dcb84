"""Fusing BatchNorm and RepVGG does not change what is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgedetr.layers.convolution import ConvNorm, RepVgg
from edgedetr.layers.norm import FrozenBatchNorm2d, Normalize


@torch.no_grad()
def spread(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | FrozenBatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                tensor.normal_()
            part.running_var.uniform_(0.1, 3)
    return module.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNorm(6, 8, 3, 2, activation="silu"),
        lambda: ConvNorm(6, 8, 1, norm=FrozenBatchNorm2d),
        lambda: ConvNorm(6, 8, 3, dilation=2, activation="relu"),
        lambda: RepVgg(6, "silu"),
    ],
    ids=["stride", "frozen", "dilated", "repvgg"],
)
@torch.no_grad()
def test_fused_equals_unfused(make: object) -> None:
    module, x = spread(make()), torch.randn(2, 6, 9, 7)  # type: ignore[operator]
    before, fused = module(x), module.fused()
    torch.testing.assert_close(fused(x), before, atol=1e-5, rtol=1e-5)  # float32 sums of 54 products
    assert not any(isinstance(part, nn.BatchNorm2d | FrozenBatchNorm2d) for part in fused.modules())
    assert torch.equal(module(x), before), "fusing leaves the original as it was"


@torch.no_grad()
def test_frozen_batch_norm_equals_batch_norm_in_evaluation() -> None:
    theirs = spread(nn.BatchNorm2d(5))
    ours = FrozenBatchNorm2d(5)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not list(ours.parameters())


def test_normalize_is_pixels_over_255_minus_mean_over_std() -> None:
    pixels = torch.tensor([0.0, 127.5, 255.0]).repeat(1, 3, 1, 1)
    got = Normalize((0.5, 0.0, 0.25), (0.5, 1.0, 0.25))(pixels)
    expected = torch.tensor([[[-1.0, 0, 1]], [[0, 0.5, 1]], [[-1, 1, 3]]])[None]
    torch.testing.assert_close(got, expected)
