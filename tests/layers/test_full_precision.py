"""Heads compute in float32 amid autocast, and as ever without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgedetr.layers.full_precision import in_float32


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_head_is_not_rounded_amid_autocast(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(64, 4), torch.randn(9, 64)
    with torch.autocast("cpu", kind):
        rounded, got, after = head(x), in_float32(head, x), head(x)
        of_half = in_float32(head, x.to(kind))
    assert rounded.dtype == after.dtype == kind, "autocast goes on around it"
    assert torch.equal(got, head(x)) and of_half.dtype == torch.float32
    assert torch.equal(of_half, head(x.to(kind).float()))
    assert not torch.equal(got, rounded.float()), "else this test shows nothing"


def test_without_autocast_it_is_a_call() -> None:
    head, x = nn.Linear(8, 4).double(), torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(in_float32(head, x), head(x))


def test_gradients_pass_through_it_in_float32() -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = in_float32(head, x).square().sum()
    loss.backward()
    wanted = torch.autograd.grad(head(x).square().sum(), (x, head.weight))
    torch.testing.assert_close((x.grad, head.weight.grad), wanted)


def test_a_model_that_is_only_counted_passes() -> None:
    assert in_float32(nn.Linear(8, 4, device="meta"), torch.empty(3, 8, device="meta")).shape == (3, 4)
