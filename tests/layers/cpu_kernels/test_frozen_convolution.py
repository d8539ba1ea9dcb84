"""Convolutions that do not learn give in one pass what convolution, normalization, sum and ReLU give in four."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers import convolution as conv_module
from edgedetr.layers.convolution import ConvNorm
from edgedetr.layers.cpu_kernels.frozen_convolution import applies
from edgedetr.layers.norm import FrozenBatchNorm2d
from edgedetr.models.backbones.resnet import resnet

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def block(**words: object) -> ConvNorm:
    torch.manual_seed(0)
    made = ConvNorm(6, 8, norm=FrozenBatchNorm2d, **words).requires_grad_(False)  # type: ignore[arg-type]
    scatter(made)
    return made


@torch.no_grad()
def scatter(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                tensor.normal_()
            part.running_var.uniform_(0.5, 2)


def by_hand(made: ConvNorm, x: Tensor) -> Tensor:
    """In float64, one thing after the other."""
    conv, norm = made.conv, made.norm
    y = F.conv2d(x.double(), conv.weight.double(), None, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
    y = (y - norm.running_mean.double()[:, None, None]) / (norm.running_var.double() + norm.eps)[:, None, None].sqrt()  # type: ignore[operator, index, union-attr]
    return y * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "words",
    [
        {"kernel": 3, "stride": 2, "activation": "relu"},
        {"kernel": 3, "dilation": 2},
        {"kernel": 1, "activation": "silu"},
    ],
    ids=["stride", "dilated", "silu"],
)
def test_one_pass_equals_float64_steps(words: dict[str, object], layout: str) -> None:
    made, x = block(**words), torch.randn(2, 6, 9, 7).contiguous(memory_format=LAYOUTS[layout])
    assert made.is_frozen(x), "else this test compares nothing"
    wanted = made.activation(by_hand(made, x))
    torch.testing.assert_close(made(x).double(), wanted, atol=1e-5, rtol=1e-5)  # float32 sums of 54 products


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet18vd", "resnet50"])
def test_a_frozen_backbone_gives_what_a_learning_one_gives(name: str, layout: str) -> None:
    torch.manual_seed(0)
    frozen = resnet(name, (2, 5), width=0.25)
    scatter(frozen)
    learning = copy.deepcopy(frozen)
    frozen.requires_grad_(False)
    x = torch.rand(2, 3, 50, 70).contiguous(memory_format=LAYOUTS[layout])
    for got, wanted in zip(frozen(x), learning(x), strict=True):
        assert not got.requires_grad and wanted.requires_grad
        # Relative to the map's largest number: float32 sums of up to 1152 products, over 20 to 53 layers.
        torch.testing.assert_close(got / wanted.abs().max(), wanted / wanted.abs().max(), atol=2e-6, rtol=0)


@torch.no_grad()
def test_changed_weights_are_packed_again() -> None:
    made, other, x = block(kernel=3), block(kernel=3), torch.randn(1, 6, 5, 5)
    made(x)
    other.conv.weight.normal_()
    other.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    made.load_state_dict(other.state_dict())
    torch.testing.assert_close(made(x).double(), by_hand(other, x), atol=1e-5, rtol=1e-5)
    made.norm.bias.add_(1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(made(x).double(), by_hand(other, x) + 1, atol=1e-5, rtol=1e-5)
    made.conv.weight.data = made.conv.weight.data * 2  # replaced by another tensor, as .to() does
    made.norm.running_mean.mul_(2)  # type: ignore[operator, union-attr]
    shift = made.norm.bias.double()[:, None, None]  # type: ignore[operator, union-attr]
    wanted = 2 * (by_hand(other, x) + 1 - shift) + shift
    torch.testing.assert_close(made(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_learns_before_and_inside() -> None:
    made, x = block(kernel=3, activation="relu"), torch.randn(1, 6, 5, 5, requires_grad=True)
    assert not made.is_frozen(x), "the images' side wants a gradient"
    made(x).sum().backward()
    copied = copy.deepcopy(x.detach()).requires_grad_()
    by_hand(made, copied).relu().sum().backward()
    torch.testing.assert_close(x.grad, copied.grad, atol=1e-5, rtol=1e-5)
    made.conv.weight.requires_grad_(True)
    assert not made.is_frozen(x.detach()), "the kernel wants a gradient"


@torch.no_grad()
def test_under_autocast_one_pass_is_within_bfloat16_of_float64_steps() -> None:
    made, x = block(kernel=3, activation="relu"), torch.randn(2, 6, 9, 7)
    plus = torch.randn(2, 8, 9, 7)
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert not made.is_frozen(x)
            pytest.skip("no products of bfloat16 on this CPU")
        assert made.is_frozen(x) and made.is_frozen(x.bfloat16())
        alone, summed = made(x), made.frozen_forward(x.bfloat16(), True, plus.bfloat16())
    for got, wanted in ((alone, by_hand(made, x).relu()), (summed, (by_hand(made, x) + plus).relu())):
        assert got.dtype == torch.bfloat16
        # Kernel, image and sum are rounded to 8 bits; relative to the largest number.
        assert float((got.double() - wanted).abs().max()) <= 3 * 2**-8 * float(wanted.abs().max())
    assert torch.equal(made(x), exact), "and float32 is packed again after it"


def test_half_precision_and_graphs_take_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = block(kernel=3), torch.randn(1, 6, 5, 5)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not applies(x, made.conv) and made(x).dtype == torch.float16
    assert not applies(x.double(), made.conv) and not applies(x.bfloat16(), made.conv)
    called = []
    monkeypatch.setattr(conv_module, "convolve", lambda *args: called.append(args))
    torch.jit.trace(made, x, check_trace=False)
    torch.export.export(made, (x,))
    assert not called


def test_what_is_packed_is_not_part_of_the_model() -> None:
    made, x = block(kernel=3), torch.randn(1, 6, 5, 5)
    keys, made_before = list(made.state_dict()), set(vars(made)) | set(vars(made.conv))
    made(x)
    assert list(made.state_dict()) == keys and set(vars(made)) | set(vars(made.conv)) == made_before
    assert torch.equal(copy.deepcopy(made)(x), made(x))
