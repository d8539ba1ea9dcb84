"""Deformable convolution: the standard's operator in ONNX Runtime, the plain convolution, and both ways to sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgedetr.layers.deform_conv import MASKS, OFFSETS, DeformConv

both = pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
strides = pytest.mark.parametrize("stride, size", [(1, (7, 9)), (2, (7, 9)), (2, (8, 10))])


def inputs(stride: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A map, offsets that reach beyond it, and weights of the taps."""
    torch.manual_seed(0)
    height, width = ((side - 1) // stride + 1 for side in size)
    return (torch.randn(2, 4, *size), torch.randn(2, OFFSETS, height, width) * 3,
            torch.rand(2, MASKS, height, width))


@both
@strides
@torch.no_grad()
def test_it_is_the_standards_operator(sampling: str, stride: int, size: tuple[int, int]) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    layer = DeformConv(4, 5, stride, sampling)
    layer.mix.bias.normal_()
    node = onnx.helper.make_node("DeformConv", ["x", "weight", "offset", "bias", "mask"], ["out"], kernel_shape=[3, 3],
                                 strides=[stride] * 2, pads=[1] * 4)
    x, offset, mask = inputs(stride, size)
    feed = {"x": x, "weight": layer.mix.weight.reshape(5, 4, 3, 3), "offset": offset, "bias": layer.mix.bias,
            "mask": mask}
    graph = onnx.helper.make_graph(
        [node], "conv", [onnx.helper.make_tensor_value_info(name, 1, value.shape) for name, value in feed.items()],
        [onnx.helper.make_tensor_value_info("out", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {name: value.numpy() for name, value in feed.items()})[0]
    actual = layer(x, offset, mask)
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-5, rtol=0)   # sums of 36 products


@both
@strides
def test_without_offsets_it_is_a_convolution(sampling: str, stride: int, size: tuple[int, int]) -> None:
    layer = DeformConv(4, 5, stride, sampling)
    x, offset, mask = inputs(stride, size)
    expected = F.conv2d(x, layer.mix.weight.reshape(5, 4, 3, 3), layer.mix.bias, stride, padding=1)
    actual = layer(x, torch.zeros_like(offset), torch.ones_like(mask))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@strides
def test_both_ways_to_sample_have_the_same_gradients(stride: int, size: tuple[int, int]) -> None:
    found = []
    layer = DeformConv(4, 5, stride).double()
    for sampling in ("grid_sample", "gather"):
        layer.sampling = sampling
        leaves = [tensor.double().requires_grad_() for tensor in inputs(stride, size)]
        out = layer(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, layer.mix.weight])])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
