"""Weighted sums of rows: the fast form equals the plain one, in values and in every gradient."""

from __future__ import annotations

import pytest
import torch

from edgedetr.layers.cpu_kernels.weighted_rows import weighted_rows


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    index = torch.randint(9, (2, 5, 3, 4))
    index[0, 0, 0] = 2  # one row four times in one sum
    return torch.randn(11, 6, requires_grad=True), index, torch.randn(2, 5, 3, 4, requires_grad=True)


def test_values_and_gradients_are_those_of_the_written_out_sum() -> None:
    table, index, weight = case()
    out = weighted_rows(table, index, weight)
    expected = (weight[..., None] * table[index]).sum(-2)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, (table, weight), seed), torch.autograd.grad(expected, (table, weight), seed)
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("which", [0, 2])
def test_gradients_that_nobody_needs_are_not_made(which: int) -> None:
    inputs = list(case())
    inputs[which] = inputs[which].detach()
    out = weighted_rows(*inputs)
    out.sum().backward()
    assert inputs[which].grad is None
    assert inputs[2 - which].grad is not None


def test_half_precision_and_tracing_take_the_plain_form() -> None:
    table, index, weight = case()
    bf16 = weighted_rows(table.bfloat16(), index, weight.bfloat16())
    assert bf16.dtype == torch.bfloat16
    torch.testing.assert_close(bf16.float(), (weight[..., None] * table[index]).sum(-2), atol=0.1, rtol=0.05)  # 8 bits
    traced = torch.jit.trace(lambda t, w: weighted_rows(t, index, w), (table.detach(), weight.detach()))
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert "aten::embedding" in kinds and "aten::embedding_bag" not in kinds
    torch.testing.assert_close(traced(table, weight), weighted_rows(table, index, weight))


def test_sums_of_rows_are_made_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    table, index, weight = torch.randn(9, 4).bfloat16(), torch.randint(0, 9, (3, 5)), torch.rand(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = weighted_rows(table, index, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, (weight[..., None] * table.float()[index]).sum(-2))


def test_the_sum_of_nothing_is_empty() -> None:
    table, index, weight = case()
    out = weighted_rows(table, index[:0], weight[:0])
    assert out.shape == (0, 5, 3, 6)
    assert torch.equal(torch.autograd.grad(out.sum(), table)[0], torch.zeros_like(table))
