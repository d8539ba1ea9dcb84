"""Conditional DETR: the same detections as transformers' class, and the positions of its queries."""

from __future__ import annotations

import pytest
import torch
from references import reference_resnet, transformers, with_spread

from edgedetr.models import build
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.members.conditional_detr import ConditionalDetrConfig

CLASSES = 5
SMALL = {
    "backbone": "resnet18",
    "backbone_width": 0.25,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "queries": 10,
}


def reference() -> torch.nn.Module:
    return transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(
            backbone_config=reference_resnet(18, width=0.25),
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            num_labels=CLASSES,
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=10,
        )
    )


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return with_spread(reference())


@torch.no_grad()
def test_detections_equal_those_of_transformers(theirs: torch.nn.Module) -> None:
    ours = build("conditional_detr", ConditionalDetrConfig(**SMALL), CLASSES).eval()
    load_weights(ours, translate("conditional_detr", theirs.state_dict()), "transformers")
    images = torch.randn(2, 3, 96, 128)
    expected, got = theirs(pixel_values=images), ours(images)
    assert min(expected.logits.std(), expected.pred_boxes.std()) > 1e-2, "the reference says something"
    # float32 through about 40 layers; measured 2e-8 and 6e-8
    torch.testing.assert_close(got.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_images_give_what_transformers_gives(theirs: torch.nn.Module) -> None:
    ours = build("conditional_detr", ConditionalDetrConfig(**SMALL), CLASSES).eval()
    load_weights(ours, translate("conditional_detr", theirs.state_dict()), "transformers")
    images, padding = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[0, :, 96:], padding[1, 64:] = True, True
    expected = theirs(pixel_values=images, pixel_mask=(~padding).long())
    got = ours(images, padding)
    torch.testing.assert_close(got.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=0)


def test_parameters_are_as_many_as_transformers_counts() -> None:
    with torch.device("meta"):
        detector = build("conditional_detr", ConditionalDetrConfig(), 91)
    count = sum(p.numel() for p in detector.parameters()) + frozen_norms(detector)
    assert count / 1e6 == pytest.approx(43.4, rel=0.01)


def frozen_norms(detector: torch.nn.Module) -> int:
    """Scales and shifts of the frozen norms, which are buffers here and parameters in other people's counts."""
    return sum(b.numel() for name, b in detector.named_buffers() if name.endswith((".norm.weight", ".norm.bias")))


def test_only_the_first_layer_adds_the_position_to_the_content() -> None:
    detector = build("conditional_detr", ConditionalDetrConfig(**SMALL), CLASSES)
    assert [layer.cross_attention.q_position is None for layer in detector.decoder.layers] == [False, True, True]


def test_a_fresh_box_is_at_the_reference_point_of_its_query() -> None:
    detector = build("conditional_detr", ConditionalDetrConfig(**SMALL), CLASSES).eval()
    with torch.no_grad():
        memory = detector.encode(torch.randn(1, 3, 64, 64))
        queries = detector.select(memory)
        boxes = detector.decode(queries, memory).boxes
    torch.testing.assert_close(boxes[..., :2], queries.reference.expand(3, -1, -1, -1), atol=1e-6, rtol=0)
    assert (boxes[..., 2:] == 0.5).all()


def test_the_loss_moves_the_points() -> None:
    detector = build("conditional_detr", ConditionalDetrConfig(**SMALL), CLASSES)
    detector(torch.randn(1, 3, 64, 64)).boxes.square().sum().backward()
    assert detector.selector.point.head.layers[0].weight.grad.abs().max() > 0
