"""Anchor DETR: queries, points and positions by the paper; attention itself is tested in layers/test_row_column."""

from __future__ import annotations

import math

import pytest
import torch

from edgedetr.errors import ModelError
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.members.anchor_detr import AnchorDetrConfig, anchor_detr

SMALL = {
    "backbone": "resnet18",
    "backbone_width": 0.25,
    "dilate_last": False,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "queries": 12,
    "patterns": 3,
}
CLASSES = 3


def waves(number: float, width: int) -> list[float]:
    angles = [number * 2 * math.pi / 10000 ** (2 * (channel // 2) / width) for channel in range(width)]
    return [math.sin(angle) if channel % 2 == 0 else math.cos(angle) for channel, angle in enumerate(angles)]


@torch.no_grad()
def test_every_pattern_is_at_every_point() -> None:
    detector = anchor_detr(AnchorDetrConfig(**SMALL), CLASSES)
    memory = detector.encode(torch.randn(2, 3, 64, 96))
    selector, queries = detector.selector, detector.select(memory)
    points, patterns = selector.points.points, selector.pattern.weight
    for n in range(12):
        pattern, point = n // 4, n % 4  # pattern 0 at all points, then pattern 1
        x, y = points[point].tolist()
        assert torch.equal(queries.content[1, n], patterns[pattern])
        assert torch.equal(queries.reference[1, n], points[point])
        plane = selector.points.adapt(torch.tensor(waves(y, 16) + waves(x, 16)))
        torch.testing.assert_close(queries.position[1, n], plane, atol=1e-5, rtol=0)  # float32 of sines to 2 pi
        along = detector.encoder.position.adapt
        torch.testing.assert_close(queries.spatial[1, n, :32], along(torch.tensor(waves(x, 32))), atol=1e-5, rtol=0)
        torch.testing.assert_close(queries.spatial[1, n, 32:], along(torch.tensor(waves(y, 32))), atol=1e-5, rtol=0)


@torch.no_grad()
def test_keys_are_at_the_centers_of_cells() -> None:
    detector = anchor_detr(AnchorDetrConfig(**SMALL), CLASSES)
    memory = detector.encode(torch.randn(1, 3, 64, 96))  # 2 x 3 cells
    adapt = detector.encoder.position.adapt
    columns = torch.stack([adapt(torch.tensor(waves((w + 0.5) / 3, 32))) for w in range(3)])
    rows = torch.stack([adapt(torch.tensor(waves((h + 0.5) / 2, 32))) for h in range(2)])
    torch.testing.assert_close(memory.axes[0][0], columns, atol=1e-5, rtol=0)
    torch.testing.assert_close(memory.axes[1][0], rows, atol=1e-5, rtol=0)


def test_the_network_of_the_axes_is_saved_once_and_learns_from_keys_and_queries() -> None:
    detector = anchor_detr(AnchorDetrConfig(**SMALL), CLASSES)
    names = list(detector.state_dict())
    assert len(names) == len(set(names)) and sum("position.adapt.layers.0.weight" in name for name in names) == 1
    assert len({tensor.data_ptr() for tensor in detector.parameters()}) == len(list(detector.parameters()))
    encoder_only = torch.autograd.grad(
        detector.encode(torch.randn(1, 3, 64, 64)).axes[0].sum(), detector.encoder.position.adapt.layers[0].weight
    )[0]
    queries = detector.select(detector.encode(torch.randn(1, 3, 64, 64)))
    queries_only = torch.autograd.grad(queries.spatial.sum(), detector.encoder.position.adapt.layers[0].weight)[0]
    assert encoder_only.abs().max() > 0 and queries_only.abs().max() > 0


def test_fresh_boxes_are_at_their_points_and_small() -> None:
    detector = anchor_detr(AnchorDetrConfig(**SMALL), CLASSES).eval()
    with torch.no_grad():
        boxes = detector(torch.randn(1, 3, 64, 64)).boxes
    points = detector.selector.points.points.repeat(3, 1)
    torch.testing.assert_close(boxes[-1, 0, :, :2], points, atol=1e-5, rtol=0)
    torch.testing.assert_close(boxes[..., 2:], torch.full_like(boxes[..., 2:], 1 / (1 + math.exp(2))))


def test_a_grid_of_points_covers_the_image() -> None:
    detector = anchor_detr(AnchorDetrConfig(**{**SMALL, "points": "grid"}), CLASSES)
    points = detector.selector.points.points
    assert sorted(points.tolist()) == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    assert "selector.points.points" not in detector.state_dict()
    with pytest.raises(ModelError, match="5 anchor points do not fill a square grid; use 4 or 9"):
        anchor_detr(AnchorDetrConfig(**{**SMALL, "points": "grid", "queries": 15}), CLASSES)
    with pytest.raises(ModelError, match="model.queries is 10; expected a multiple of model.patterns, 3"):
        AnchorDetrConfig(**{**SMALL, "queries": 10})


@torch.no_grad()
def test_a_noised_object_is_at_its_center() -> None:
    detector = anchor_detr(AnchorDetrConfig(**SMALL, denoising=True), CLASSES)
    boxes, labels = torch.rand(2, 5, 4), torch.randint(CLASSES + 1, (2, 5))
    known = detector.selector.noised(labels, boxes)
    assert torch.equal(known.reference, boxes[..., :2])
    assert torch.equal(known.content, detector.selector.denoising_class_embed.weight[labels])
    position, along = detector.selector.points.embed(boxes[..., :2])
    assert torch.equal(known.position, position) and torch.equal(known.spatial, along)


@torch.no_grad()
def test_padding_changes_nothing_that_is_not_next_to_it() -> None:
    """Garbage behind the mask; and a padded map gives what the map without its padding gives."""
    detector = anchor_detr(AnchorDetrConfig(**SMALL), CLASSES).eval()
    for parameter in detector.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    padding = torch.zeros(1, 96, 128, dtype=torch.bool)
    padding[:, 64:], padding[:, :, 96:] = True, True
    maps = torch.randn(1, 128, 3, 4)
    hidden = padding[:, None, ::32, ::32]
    tokens = torch.randn(1, 12, 32)

    def answer(tokens: torch.Tensor, shape: tuple[int, int], padding: torch.Tensor | None):
        encoder = detector.encoder
        axes = encoder.position(tokens, shape, padding)
        flat = None if padding is None else padding.flatten(1)
        for layer in encoder.layers:
            tokens = layer(tokens, axes, shape, flat)
        from edgedetr.models.records import Memory

        memory = Memory(tokens, [shape], [32], padding=flat, axes=axes)
        return detector.decode(detector.select(memory), memory)

    small = hidden[:, 0]
    padded = answer(tokens, (3, 4), small)
    garbage = torch.where(small.flatten(1)[..., None], torch.randn_like(tokens) * 5, tokens)
    other = answer(garbage, (3, 4), small)
    torch.testing.assert_close(padded.boxes, other.boxes, atol=1e-6, rtol=0)
    cropped = answer(tokens.unflatten(1, (3, 4))[:, :2, :3].flatten(1, 2), (2, 3), None)
    torch.testing.assert_close(padded.logits, cropped.logits, atol=1e-4, rtol=0)  # other sizes, other blocking; 2e-6
    torch.testing.assert_close(padded.boxes, cropped.boxes, atol=1e-5, rtol=0)
    assert maps.shape[2:] == (3, 4)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)], ids=["wide", "tall"])
@torch.no_grad()
def test_the_deployed_graph_holds_positions_as_constants(shape: tuple[int, int]) -> None:
    detector = anchor_detr(AnchorDetrConfig(**SMALL), CLASSES)
    exported = torch.export.export(DeployGraph(detector, *shape), (torch.zeros(1, 3, *shape),))
    kinds = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not kinds & {"aten.sin.default", "aten.cos.default", "aten.cumsum.default"}


def test_parameters_are_as_many_as_published() -> None:
    """37.0 million: the DC5 model for COCO's 91 ids, without what batch norms hold."""
    with torch.device("meta"):
        detector = anchor_detr(AnchorDetrConfig(), 91)
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(37.0, rel=0.01)
