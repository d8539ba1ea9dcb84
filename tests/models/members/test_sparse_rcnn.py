"""Sparse R-CNN: the cascade against a reference in pixels, and what the code of its authors trips over."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from members import CLASSES, HEIGHT, WIDTH, sample_images, small

from edgedetr.models import build
from edgedetr.models.box_heads import DeltaBoxes
from edgedetr.models.members.sparse_rcnn import SparseRcnnConfig


def moved_in_pixels(delta: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """R-CNN's appendix C with the weights 2, 2, 1, 1: corners in pixels -> corners in pixels, one box."""
    x0, y0, x1, y1 = box.tolist()
    dx, dy, dw, dh = (delta / torch.tensor([2.0, 2.0, 1.0, 1.0])).tolist()
    width, height = x1 - x0, y1 - y0
    cx, cy = x0 + width / 2 + dx * width, y0 + height / 2 + dy * height
    limit = math.log(100000 / 16)
    width, height = math.exp(min(dw, limit)) * width, math.exp(min(dh, limit)) * height
    return torch.tensor([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])


def test_deltas_move_boxes_as_in_pixels() -> None:
    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(1, 20, 2), torch.rand(1, 20, 2) + 0.01], dim=-1)
    delta = torch.randn(1, 20, 4)
    delta[0, :2, 2:] = 20.0  # more than the clamp lets through
    actual = DeltaBoxes(8, 3, 1, 0, 0).move(delta, boxes)[0]
    pixels = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    for index in range(20):
        center, size = boxes[0, index, :2], boxes[0, index, 2:]
        corners = moved_in_pixels(delta[0, index], torch.cat([center - size / 2, center + size / 2]) * pixels) / pixels
        expected = torch.cat([(corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]])
        torch.testing.assert_close(actual[index], expected, atol=1e-4, rtol=1e-5)  # float32, boxes of 6000 images


@torch.no_grad()
def test_the_cascade_is_that_of_the_specification() -> None:
    """Stage by stage with torch's own attention and functional layers; the reading of boxes has its own test."""
    detector = small("sparse_rcnn").double()
    memory = detector.encode(detector.normalize(sample_images().double()))
    queries = detector.select(memory)
    actual = detector.decode(queries, memory)
    content, boxes, heads = queries.content, queries.reference, detector.decoder.boxes
    assert torch.equal(boxes[0], boxes[1])
    for number, stage in enumerate(detector.decoder.layers):
        attention = stage.self_attention
        weight = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
        bias = torch.cat([attention.q.bias, attention.k.bias, attention.v.bias])
        among, _ = F.multi_head_attention_forward(
            *[content.transpose(0, 1)] * 3,
            content.shape[-1],
            attention.heads,
            weight,
            bias,
            None,
            None,
            False,
            0.0,
            attention.out.weight,
            attention.out.bias,
        )
        content = stage.self_norm(content + among.transpose(0, 1))
        read = stage.cross_attention
        features = read.roi(memory.tokens, memory.shapes, memory.strides, boxes)
        content = stage.cross_norm(content + read.interaction(content, features))
        up, down = stage.feedforward.up, stage.feedforward.down
        content = stage.feedforward_norm(content + down(F.relu(up(content))))
        classes = boxed = content
        for linear, norm, _ in [list(heads.class_tower[number])]:
            classes = F.relu(norm(classes @ linear.weight.T))
        tower = list(heads.box_tower[number])
        assert len(tower) == 9
        for linear, norm in zip(tower[::3], tower[1::3]):
            boxed = F.relu(norm(boxed @ linear.weight.T))
        logits = classes @ heads.score[number].weight.T + heads.score[number].bias
        delta = boxed @ heads.box[number].weight.T + heads.box[number].bias
        delta = delta / torch.tensor([2.0, 2.0, 1.0, 1.0])
        boxes = torch.cat([boxes[..., :2] + delta[..., :2] * boxes[..., 2:], boxes[..., 2:] * delta[..., 2:].exp()], -1)
        torch.testing.assert_close(actual.logits[number], logits, atol=1e-10, rtol=0)  # float64
        torch.testing.assert_close(actual.boxes[number], boxes, atol=1e-10, rtol=0)


def test_proposals_start_as_the_whole_image_and_learn() -> None:
    detector = build(
        "sparse_rcnn",
        SparseRcnnConfig(
            backbone="resnet18",
            backbone_width=0.25,
            hidden=32,
            heads=4,
            ffn=48,
            decoder_layers=2,
            queries=7,
            frozen_stages=0,
        ),
        CLASSES,
    )
    queries = detector.select(detector.encode(detector.normalize(sample_images())))
    assert queries.reference.tolist() == [[[0.5, 0.5, 1.0, 1.0]] * 7] * 2
    outputs = detector.decode(queries, detector.encode(detector.normalize(sample_images())))
    outputs.boxes[0].sum().backward()
    assert detector.selector.box.weight.grad.abs().sum() > 0


def test_a_stage_sends_no_gradient_to_the_boxes_of_the_stage_before() -> None:
    detector = small("sparse_rcnn").train()
    detector(detector.normalize(sample_images())).boxes[1].sum().backward()
    assert not detector.decoder.boxes.box[0].weight.grad.any()
    assert detector.decoder.boxes.box[1].weight.grad.any()
    assert not detector.selector.box.weight.grad.any()


@pytest.mark.parametrize("classes", [8, 32, 48])  # widths that occur in the model: the original's prior hit those
def test_only_the_class_bias_starts_at_the_prior(classes: int) -> None:
    config = SparseRcnnConfig(
        backbone="resnet18",
        backbone_width=0.25,
        hidden=32,
        heads=4,
        ffn=48,
        dynamic_hidden=8,
        decoder_layers=2,
        queries=7,
    )
    detector = build("sparse_rcnn", config, classes)
    prior = -math.log(99)
    for name, parameter in detector.named_parameters():
        at_prior = torch.isclose(parameter.detach(), torch.tensor(prior)).all().item()
        assert at_prior == (name.startswith("decoder.boxes.score.") and name.endswith("bias")), name


def test_the_parameter_count_is_the_published_one() -> None:
    with torch.device("meta"):
        detector = build("sparse_rcnn", SparseRcnnConfig(), 80)
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(106.2, rel=0.001)
