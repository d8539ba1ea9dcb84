"""RoIAlign: a loop over samples, the standard's operator in ONNX Runtime, and the level a box belongs to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgedetr.layers.roi_align import RoiAlign, level_of

SHAPES, STRIDES = [(24, 32), (12, 16), (6, 8), (3, 4)], [4, 8, 16, 32]  # an image of 96 x 128
HEIGHT, WIDTH = 96, 128
TOKENS = sum(h * w for h, w in SHAPES)


def boxes_of_every_kind() -> torch.Tensor:
    """[2, 9, 4]: inside, over each border, wholly outside, tiny, and larger than the image."""
    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(2, 9, 2), torch.rand(2, 9, 2) * 0.5 + 0.05], dim=-1)
    boxes[0, :6] = torch.tensor(
        [
            [0.5, 0.5, 1.0, 1.0],
            [0.0, 0.0, 0.3, 0.3],
            [1.0, 1.0, 0.4, 0.2],
            [1.4, 0.5, 0.2, 0.2],
            [0.5, 0.5, 1e-3, 1e-3],
            [0.5, 0.4, 4.0, 3.0],
        ]
    )
    return boxes.double()


def tokens(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, TOKENS, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sample(level: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """One bilinear sample of a map [H, W, C]; positions in cells, whose centers are whole numbers."""
    height, width = level.shape[:2]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros_like(level[0, 0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    above = level[y0, x0] * (1 - (x - x0)) + level[y0, x1] * (x - x0)
    below = level[y1, x0] * (1 - (x - x0)) + level[y1, x1] * (x - x0)
    return above * (1 - (y - y0)) + below * (y - y0)


def by_loops(table: torch.Tensor, boxes: torch.Tensor, size: int, samples: int) -> torch.Tensor:
    """Box by box, bin by bin, from Mask R-CNN's section 3 and FPN's equation 1."""
    maps = [part.unflatten(1, shape) for part, shape in zip(table.split([h * w for h, w in SHAPES], dim=1), SHAPES)]
    out = torch.zeros(*boxes.shape[:2], size * size, table.shape[-1], dtype=table.dtype)
    for image, row in enumerate(boxes):
        for number, (cx, cy, w, h) in enumerate(row.tolist()):
            cx, cy, w, h = cx * WIDTH, cy * HEIGHT, w * WIDTH, h * HEIGHT
            index = min(max(math.floor(4 + math.log2(math.sqrt(w * h) / 224 + 1e-8)), 2), 5) - 2
            stride = STRIDES[index]
            for i in range(size):
                for j in range(size):
                    total = torch.zeros(table.shape[-1], dtype=table.dtype)
                    for a in range(samples):
                        for b in range(samples):
                            y = (cy - h / 2 + h / size * (i + (a + 0.5) / samples)) / stride - 0.5
                            x = (cx - w / 2 + w / size * (j + (b + 0.5) / samples)) / stride - 0.5
                            total += sample(maps[index][image], y, x)
                    out[image, number, i * size + j] = total / samples**2
    return out


@pytest.mark.parametrize("size, samples", [(7, 2), (3, 1), (2, 3)])
def test_bins_are_means_of_bilinear_samples(size: int, samples: int) -> None:
    table, boxes = tokens(), boxes_of_every_kind()
    actual = RoiAlign(size, samples)(table, SHAPES, STRIDES, boxes)
    torch.testing.assert_close(actual, by_loops(table, boxes, size, samples), atol=1e-12, rtol=0)  # float64


def test_it_is_the_standards_operator() -> None:
    """ONNX Runtime's RoiAlign, half_pixel, on one level after the other."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node(
        "RoiAlign",
        ["map", "rois", "image"],
        ["out"],
        output_height=7,
        output_width=7,
        sampling_ratio=2,
        spatial_scale=1 / 8,
        coordinate_transformation_mode="half_pixel",
    )
    inputs = [
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("map", 1, [2, 3, 12, 16]), ("rois", 1, ["n", 4]), ("image", 7, ["n"]))
    ]
    graph = onnx.helper.make_graph([node], "roi", inputs, [onnx.helper.make_tensor_value_info("out", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    table, boxes = torch.randn(2, 12 * 16, 3), boxes_of_every_kind().float()
    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)
    rois = (corners * torch.tensor([WIDTH, HEIGHT] * 2)).flatten(0, 1)
    maps = table.transpose(1, 2).unflatten(2, (12, 16))
    expected = session.run(
        None, {"map": maps.numpy(), "rois": rois.numpy(), "image": np.repeat(np.arange(2), boxes.shape[1])}
    )[0]
    actual = RoiAlign(7, 2)(table, [(12, 16)], [8], boxes)  # [2, N, 49, C]
    actual = actual.flatten(0, 1).transpose(1, 2).unflatten(2, (7, 7))
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-5)  # positions in float32; measured 4e-6


def test_gradients_reach_the_tokens_and_not_the_boxes() -> None:
    table, boxes = tokens(2).requires_grad_(), boxes_of_every_kind().requires_grad_()
    roi = RoiAlign(2, 2)
    out = roi(table, SHAPES, STRIDES, boxes)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    assert boxes.grad is None
    # The output is linear in the tokens: its derivative along any direction is its value there.
    direction = torch.randn(table.shape, dtype=table.dtype, generator=torch.Generator().manual_seed(3))
    slope = (roi(direction, SHAPES, STRIDES, boxes) * weights).sum()
    torch.testing.assert_close((table.grad * direction).sum(), slope)


def test_a_box_inside_a_constant_image_reads_the_constant() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 0.6, 0.4], [0.1, 0.9, 0.1, 0.1]]])
    out = RoiAlign()(torch.full((1, TOKENS, 2), 3.0), SHAPES, STRIDES, boxes)
    torch.testing.assert_close(out, torch.full((1, 2, 49, 2), 3.0))


@pytest.mark.parametrize("strides, first", [([4, 8, 16, 32], 2), ([8, 16, 32, 64, 128], 3)])
def test_a_box_belongs_to_the_level_of_its_size(strides: list[int], first: int) -> None:
    last = first + len(strides) - 1
    sides = torch.cat(
        [
            torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 900 + 0.1,
            torch.tensor([[112.0, 112.0], [224.0, 224.0], [448.0, 448.0], [896.0, 448.0]]),
        ]
    )
    expected = [
        min(max(math.floor(4 + math.log2(math.sqrt(w * h) / 224 + 1e-8)), first), last) - first
        for w, h in sides.tolist()
    ]
    boxes = torch.cat([torch.zeros_like(sides), sides], dim=1)
    assert level_of(boxes, strides).tolist() == expected
