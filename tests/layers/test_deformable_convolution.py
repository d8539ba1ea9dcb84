"""Deformable convolution: the standard's operator in ONNX Runtime, the plain convolution, and both ways to sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgedetr.layers.deformable_convolution import MASKS, OFFSETS, DeformRead, Source

both = pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
strides = pytest.mark.parametrize("stride, size", [(1, (7, 9)), (2, (7, 9)), (2, (8, 10))])


def grid(stride: int, size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1


def inputs(stride: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A map, offsets that reach beyond it, and weights of the taps, as maps."""
    torch.manual_seed(0)
    return (
        torch.randn(2, 4, *size),
        torch.randn(2, OFFSETS, *grid(stride, size)) * 3,
        torch.rand(2, MASKS, *grid(stride, size)),
    )


def convolved(
    read: DeformRead,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: int,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The whole convolution, weight [O, C, 3, 3]; two other maps are in the table and are read as well."""
    height, width = x.shape[2:]
    tokens = [item.flatten(2).transpose(1, 2) for item in (x.new_zeros(2, 4, 3, 2), x, x.new_ones(2, 4, 1, 1))]
    out = (offset.shape[2], offset.shape[3])
    sources = [Source((1, 1), 6 + height * width, (1, 2)), Source((height, width), 6, out, stride)]
    predictions = [
        torch.cat([item.new_zeros(2, 2, item.shape[1]), item.flatten(2).transpose(1, 2)], dim=1)
        for item in (offset, mask)
    ]
    taps = read(torch.cat(tokens, dim=1), sources, *predictions)[:, 2:]  # [B, h w, 9 C]
    matrix = weight.flatten(2).transpose(1, 2).flatten(1)  # [O, 9 C], tap after tap
    return (taps @ matrix.T + bias).transpose(1, 2).unflatten(2, out)


@both
@strides
@torch.no_grad()
def test_with_a_linear_it_is_the_standards_operator(sampling: str, stride: int, size: tuple[int, int]) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node(
        "DeformConv",
        ["x", "weight", "offset", "bias", "mask"],
        ["out"],
        kernel_shape=[3, 3],
        strides=[stride] * 2,
        pads=[1] * 4,
    )
    x, offset, mask = inputs(stride, size)
    feed = {"x": x, "weight": torch.randn(5, 4, 3, 3) * 0.3, "offset": offset, "bias": torch.randn(5), "mask": mask}
    graph = onnx.helper.make_graph(
        [node],
        "conv",
        [onnx.helper.make_tensor_value_info(name, 1, value.shape) for name, value in feed.items()],
        [onnx.helper.make_tensor_value_info("out", 1, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {name: value.numpy() for name, value in feed.items()})[0]
    actual = convolved(DeformRead(sampling), feed["weight"], feed["bias"], stride, x, offset, mask)
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-5, rtol=0)  # sums of 36; measured 8e-7


@both
@strides
def test_without_offsets_it_is_a_convolution(sampling: str, stride: int, size: tuple[int, int]) -> None:
    x, offset, mask = inputs(stride, size)
    weight, bias = torch.randn(5, 4, 3, 3) * 0.3, torch.randn(5)
    actual = convolved(DeformRead(sampling), weight, bias, stride, x, torch.zeros_like(offset), torch.ones_like(mask))
    torch.testing.assert_close(actual, F.conv2d(x, weight, bias, stride, padding=1), atol=1e-5, rtol=0)


@strides
def test_both_ways_to_sample_have_the_same_gradients(stride: int, size: tuple[int, int]) -> None:
    found, weight = [], torch.randn(5, 4, 3, 3, dtype=torch.float64)
    for sampling in ("grid_sample", "gather"):
        leaves = [tensor.double().requires_grad_() for tensor in inputs(stride, size)]
        out = convolved(DeformRead(sampling), weight, weight.new_zeros(5), stride, *leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
