"""A feed-forward block that learns on a CPU in one piece gives what its parts give one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgedetr.layers import feedforward as module
from edgedetr.layers.feedforward import FeedForward
from edgedetr.layers.lora import adapt


@pytest.fixture(autouse=True)
def _nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)


def made(**words: object) -> FeedForward:
    torch.manual_seed(0)
    block = FeedForward(6, 20, **words)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block


def fused(y: Tensor) -> bool:
    return "_FeedForward" in str(y.grad_fn) or "_FeedForward" in str(y.grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def by_hand(block: FeedForward, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """In float64, written out: y = W2 max(0, W1 x + b1) + b2, and what `gradient` of y is for x, W1, b1, W2, b2."""
    w1, b1, w2, b2 = (p.detach().double() for p in block.parameters())
    x, gradient = x.detach().double(), gradient.double()
    before = torch.einsum("...i,hi->...h", x, w1) + b1
    hidden = before.clamp(min=0)
    of_hidden = torch.einsum("...o,oh->...h", gradient, w2) * (before > 0)
    flat, rows = of_hidden.flatten(0, -2), x.flatten(0, -2)
    return [
        torch.einsum("...h,oh->...o", hidden, w2) + b2,
        torch.einsum("...h,hi->...i", of_hidden, w1),
        torch.einsum("nh,ni->hi", flat, rows),
        flat.sum(0),
        torch.einsum("no,nh->oh", gradient.flatten(0, -2), hidden.flatten(0, -2)),
        gradient.flatten(0, -2).sum(0),
    ]


@pytest.mark.parametrize("shape", [(7, 6), (2, 9, 6), (2, 3, 4, 6)])
def test_values_and_gradients_equal_float64(shape: tuple[int, ...]) -> None:
    block, x = made(), torch.randn(shape, requires_grad=True)
    y = block(x)
    assert fused(y), "else this test compares torch with itself"
    gradient = torch.randn_like(y)
    kept = gradient.clone()
    y.backward(gradient)
    assert torch.equal(gradient, kept), "only tensors that the block made are changed in place, not its input"
    found = [y.detach(), x.grad, *(p.grad for p in block.parameters())]
    for got, wanted in zip(found, by_hand(block, x, gradient), strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-5)  # float32 sums of up to 24 products


def test_under_autocast_it_is_within_bfloat16_of_float64() -> None:
    block, x = made(), torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not fused(y)
        pytest.skip("no products of bfloat16 on this CPU")
    assert fused(y) and y.dtype == torch.bfloat16
    gradient = torch.randn_like(y)
    y.backward(gradient)
    found = [y.detach(), x.grad, *(p.grad for p in block.parameters())]
    for got, wanted in zip(found, by_hand(block, x, gradient), strict=True):
        assert got is not None
        # Five roundings to 8 bits on the way, relative to the largest number.
        assert float((got.double() - wanted).abs().max()) <= 5 * 2**-8 * float(wanted.abs().max())
    assert all(p.grad.dtype == torch.float32 for p in block.parameters() if p.grad is not None)


@pytest.mark.parametrize("still", ["up", "down", "both", "x"])
def test_only_the_gradients_that_are_needed_are_made(still: str) -> None:
    block, x = made(), torch.randn(5, 6, requires_grad=still != "x")
    for name in ("up", "down"):
        getattr(block, name).requires_grad_(still not in (name, "both"))
    y = block(x)
    y.sum().backward()
    wanted = by_hand(block, x, torch.ones(5, 6))
    for tensor, want in zip([x, *block.parameters()], wanted[1:], strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), want, atol=1e-4, rtol=1e-5)


def test_dropout_after_it_is_torchs() -> None:
    block, x = made(dropout=0.5), torch.randn(50, 6)
    torch.manual_seed(1)
    y = block(x)
    assert fused(y)
    torch.manual_seed(1)
    torch.testing.assert_close(y, nn.Dropout(0.5)(block.down(block.up(x).relu())), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["dropout between", "another activation", "adapted", "evaluated", "float64", "small"])
def test_anything_else_goes_its_plain_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), torch.randn(5, 6, requires_grad=True)
    if case == "dropout between":
        block = made(activation_dropout=0.5)
        assert fused(block.eval()(x)), "which drops nothing in evaluation"
        block.train()
    elif case == "another activation":
        block = made(activation="gelu")
    elif case == "adapted":
        adapt(block, ["up"], rank=2, alpha=4.0)
    elif case == "float64":
        block, x = block.double(), x.detach().double().requires_grad_()
    elif case == "small":
        monkeypatch.setattr(module, "SMALL", 101)  # 5 rows of 20 numbers between the Linears
    called = []
    monkeypatch.setattr(module, "_FeedForward", type("Spy", (), {"apply": lambda *tensors: called.append(tensors)}))
    if case == "evaluated":
        with torch.no_grad():
            block(x)
    else:
        block(x)
    assert not called


def test_a_traced_graph_holds_the_plain_operators() -> None:
    graph = str(torch.jit.trace(made(), torch.randn(5, 6)).inlined_graph)
    assert "aten::relu" in graph and "aten::linear" in graph and "PythonOp" not in graph
