"""Private operators of PyTorch are used only where they compute what the public ones compute."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgedetr.layers import linear as linear_module
from edgedetr.layers.cpu_kernels import private_operators
from edgedetr.layers.linear import Linear


@pytest.fixture(autouse=True)
def check_again():
    """Forget what earlier tests found, before and after."""
    private_operators._checked.cache_clear()
    yield
    private_operators._checked.cache_clear()


@pytest.mark.parametrize("operator", ["linear", "convolution"])
def test_the_installed_pytorch_has_both_and_they_are_right(operator):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    assert private_operators.supports(operator)


@pytest.mark.parametrize("change", [lambda y: y * 1.01, lambda y: y.t().contiguous().t() + 1, lambda y: y.abs()])
def test_an_operator_that_computes_something_else_is_not_used_and_said(monkeypatch, caplog, change):
    right = private_operators.linear
    monkeypatch.setattr(private_operators, "linear", lambda *a, **k: change(right(*a, **k)))
    monkeypatch.setattr(linear_module, "mkl_is_narrow", lambda: True)
    monkeypatch.setattr(linear_module, "SMALL", 0)
    layer, x = Linear(7, 5), torch.randn(3, 7)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert "computes its fused linear differently" in caplog.text


def test_an_operator_that_is_gone_is_not_used_and_said(monkeypatch, caplog):
    def gone(*_: object, **__: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_convolution_pointwise'")

    monkeypatch.setattr(private_operators, "convolution", gone)
    with caplog.at_level(logging.WARNING):
        assert not private_operators.supports("convolution")
        assert not private_operators.supports("convolution")
    assert caplog.text.count("no fused convolution") == 1, "said once"


def test_without_onednn_nothing_private_is_called(monkeypatch):
    monkeypatch.setattr(private_operators, "_checked", lambda *_: pytest.fail("checked"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not private_operators.supports("linear")


def test_the_check_leaves_torchs_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    private_operators.supports("linear")
    private_operators.supports("convolution")
    assert torch.equal(torch.rand(4), expected)


def test_a_stamp_changes_when_a_tensor_is_written_or_replaced():
    layer = nn.Linear(2, 2)
    before = private_operators.stamp(layer.weight)
    assert private_operators.stamp(layer.weight) == before
    with torch.no_grad():
        layer.weight.add_(1)
    written = private_operators.stamp(layer.weight)
    layer.weight.data = layer.weight.data.clone()
    assert len({before, written, private_operators.stamp(layer.weight)}) == 3


def test_no_other_file_of_the_package_calls_private_operators():
    import ast
    from pathlib import Path

    import edgedetr

    root = Path(edgedetr.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.name == "private_operators.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                parts = name.split(".")
                if parts[0] == "torch" and any(part.startswith("_") and not part.endswith("__") for part in parts):
                    found.append(f"{path.relative_to(root)}:{node.lineno} {name}")
                if name.startswith("torch.ops."):
                    found.append(f"{path.relative_to(root)}:{node.lineno} {name}")
    assert not found
