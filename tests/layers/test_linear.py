"""A Linear whose products oneDNN makes gives what float64 gives, forwards and backwards, and only while it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from members import SMALL, sample_images, small
from torch import Tensor, nn

from edgedetr.layers import linear as linear_module
from edgedetr.layers.linear import Linear, linear, uses_onednn
from edgedetr.layers.lora import adapt


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that MKL underuses, and with no product too small."""
    monkeypatch.setattr(linear_module, "mkl_is_narrow", lambda: True)
    monkeypatch.setattr(linear_module, "SMALL", 0)


def inputs(shape: tuple[int, ...], outputs: int, bias: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(outputs, shape[-1])] + ([torch.randn(outputs)] if bias else [])
    return [tensor.requires_grad_() for tensor in tensors]


def in_float64(tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients of sums written out: y[n, o] = sum over i of x[n, i] w[o, i], plus b[o]."""
    x, weight, *bias = (tensor.detach().double() for tensor in tensors)
    gradient = gradient.double()
    y = torch.einsum("...i,oi->...o", x, weight) + (bias[0] if bias else 0)
    found = [
        y,
        torch.einsum("...o,oi->...i", gradient, weight),
        torch.einsum("no,ni->oi", gradient.flatten(0, -2), x.flatten(0, -2)),
    ]
    return [*found, gradient.flatten(0, -2).sum(0)] if bias else found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape, outputs",
    [((7, 5), 3), ((2, 9, 16), 40), ((2, 3, 4, 40), 16), ((1, 8), 8)],
    ids=["narrower", "wider", "four dimensions", "one row"],
)
def test_products_and_gradients_equal_float64(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    tensors = inputs(shape, outputs, bias)
    assert uses_onednn(*tensors[:2]), "else this test compares torch with itself"
    y = linear(tensors[0], tensors[1], tensors[2] if bias else None)
    assert y.grad_fn is not None and "_Linear" in type(y.grad_fn).__name__
    gradient = torch.randn_like(y)
    y.backward(gradient)
    for got, wanted in zip([y, *(tensor.grad for tensor in tensors)], in_float64(tensors, gradient), strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)  # float32 sums of up to 40 products


@pytest.mark.parametrize("order", ["transposed", "expanded", "sliced"])
def test_rows_may_have_any_memory_layout(order: str) -> None:
    """Tokens come as views of maps, as one row for all images, and as a part of wider ones."""
    torch.manual_seed(0)
    x = {
        "transposed": torch.randn(2, 6, 5).transpose(1, 2),
        "expanded": torch.randn(1, 5, 6).expand(3, -1, -1),
        "sliced": torch.randn(2, 5, 9)[..., 2:8],
    }[order]
    weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(4)
    y = linear(x, weight, bias)
    y.backward(y.detach().transpose(0, 1).contiguous().transpose(0, 1))
    wanted, _, of_weight = in_float64([x, weight, bias], y.detach())[:3]
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=1e-5)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), of_weight, atol=1e-4, rtol=1e-5)


def test_what_does_not_learn_gets_no_gradient() -> None:
    x, weight, bias = inputs((3, 4), 5)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None
    linear(x, weight.detach(), None).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, -1))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_every_member_is_the_same_either_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small(name).train()  # learning norms: with the running ones of `small`, attention overflows

    def step() -> list[Tensor]:
        detector.zero_grad()
        torch.manual_seed(0)  # of dropout
        found = detector(sample_images())
        (found.logits.square().mean() + found.boxes.square().mean()).backward()
        return [found.logits, found.boxes, *(p.grad for p in detector.parameters() if p.grad is not None)]

    ours = step()
    monkeypatch.setattr(linear_module, "mkl_is_narrow", lambda: False)
    wanted = step()
    assert len(ours) == len(wanted) > 20
    for got, want in zip(ours, wanted, strict=True):
        assert float((got - want).detach().abs().max()) <= 2e-3 * float(want.detach().abs().max()) + 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_no_linear_of_a_member_is_left_out(name: str) -> None:
    slow = [
        key
        for key, module in small(name).named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Linear)
    ]
    assert not slow


def test_low_rank_adaptation_takes_the_same_way() -> None:
    root = nn.Sequential(Linear(6, 5))
    adapt(root, ["0"], rank=2, alpha=4.0)
    with torch.no_grad():
        root[0].up.normal_()  # type: ignore[union-attr, operator]
    x = torch.randn(3, 6)
    y = root(x)
    assert "_Linear" in str([edge[0] for edge in y.grad_fn.next_functions[1][0].next_functions])
    torch.testing.assert_close(y, F.linear(x, root[0].fused().weight, root[0].bias), atol=1e-5, rtol=1e-5)  # type: ignore[operator, union-attr, arg-type]


def test_torchs_own_product_is_taken_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = inputs((3, 4), 5)
    assert uses_onednn(x, weight)
    with torch.no_grad():
        assert not uses_onednn(x, weight), "evaluation, calibration and counting of operations stay as they are"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    assert not uses_onednn(x.double(), weight.double())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(x, weight)
    monkeypatch.setattr(linear_module, "SMALL", 61)
    assert not uses_onednn(x, weight), "3 x 4 x 5 = 60 multiplications"


def test_a_traced_graph_holds_the_plain_product() -> None:
    layer = Linear(4, 5)
    traced = torch.jit.trace(layer, torch.randn(3, 4))
    assert "aten::linear" in str(traced.graph) and "PythonOp" not in str(traced.graph)
