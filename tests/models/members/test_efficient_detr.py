"""Efficient DETR: selection against loops, gradients where the paper wants them, fewer proposals as it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgedetr.errors import ModelError
from edgedetr.models import build
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel
from edgedetr.models.members.efficient_detr import EfficientDetrConfig
from edgedetr.models.records import Memory
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.data.dataset import Target

CLASSES, HIDDEN, KEPT, FIRST = 3, 32, 6, 14
CONFIG = EfficientDetrConfig(
    backbone="resnet18",
    backbone_width=0.25,
    hidden=HIDDEN,
    heads=4,
    ffn=48,
    encoder_layers=1,
    queries=KEPT,
    first_queries=FIRST,
    backbone_norm="trainable",
    frozen_stages=0,
    dropout=0.0,
)
SHAPES = [(4, 6), (2, 3), (1, 2)]


@torch.no_grad()
def spread(config: EfficientDetrConfig = CONFIG) -> DetrModel:
    torch.manual_seed(0)
    detector = build("efficient_detr", config, CLASSES)
    for parameter in detector.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return detector


def memory(batch: int = 2) -> Memory:
    cells = sum(h * w for h, w in SHAPES)
    tokens = torch.randn(batch, cells, HIDDEN, generator=torch.Generator().manual_seed(2))
    return Memory(tokens, list(SHAPES), [8, 16, 32])


def waves(numbers: list[float], width: int) -> np.ndarray:
    """By the definition: each number in turn; sine and cosine of 2 pi x / 10000^(2i / width)."""
    out = []
    for number in numbers:
        for pair in range(width // 2):
            angle = 2 * math.pi * number / 10000 ** (2 * pair / width)
            out += [math.sin(angle), math.cos(angle)]
    return np.array(out)


def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return layer.weight.double().numpy() @ x + layer.bias.double().numpy()


def mlp(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    for index, layer in enumerate(module.layers):
        x = linear(layer, np.maximum(x, 0) if index else x)
    return x


@torch.no_grad()
def reference(detector: DetrModel, tokens: np.ndarray, count: int, coordinates: int) -> list[dict[str, np.ndarray]]:
    """The selection for one image, cell by cell: from the specification, in loops and float64."""
    selector, candidates, cell = detector.selector, [], 0
    for level, (height, width) in enumerate(SHAPES):
        for y in range(height):
            for x in range(width):
                start = [(x + 0.5) / width, (y + 0.5) / height, 0.05 * 2**level, 0.05 * 2**level]
                usable = all(0.01 < number < 0.99 for number in start)
                token = linear(selector.project, tokens[cell] if usable else np.zeros(HIDDEN))
                token = (token - token.mean()) / np.sqrt(token.var() + selector.norm.eps)
                token = token * selector.norm.weight.double().numpy() + selector.norm.bias.double().numpy()
                logits, delta = linear(selector.score, token), mlp(selector.box, token)
                odds = [math.log(n / (1 - n)) if usable else 1e4 for n in start]
                box = 1 / (1 + np.exp(-(delta + np.array(odds))))
                candidates.append({"best": logits.max(), "token": token, "box": box[:coordinates], "cell": cell})
                cell += 1
    chosen = sorted(candidates, key=lambda one: -one["best"])[:count]
    for one in chosen:
        one["position"] = mlp(selector.place, waves(list(one["box"]), HIDDEN // 2))
    return chosen


@pytest.mark.parametrize("coordinates", [4, 2])
@torch.no_grad()
def test_selection_equals_loops_over_cells(coordinates: int) -> None:
    detector = spread(replace(CONFIG, coordinates=coordinates)).eval()
    seen = memory()
    queries = detector.select(seen)
    assert queries.reference.shape == (2, KEPT, coordinates)
    for row in range(2):
        expected = reference(detector, seen.tokens[row].double().numpy(), KEPT, coordinates)
        for number, one in enumerate(expected):
            # float32 against float64; measured 8e-7
            np.testing.assert_allclose(queries.content[row, number].numpy(), one["token"], atol=1e-4)
            np.testing.assert_allclose(queries.reference[row, number].numpy(), one["box"], atol=1e-5)
            np.testing.assert_allclose(queries.position[row, number].numpy(), one["position"], atol=1e-4)


def test_gradients_go_through_features_and_not_through_coordinates() -> None:
    detector, seen = spread(), memory()
    seen.tokens.requires_grad_()
    queries = detector.select(seen)
    assert not queries.reference.requires_grad
    queries.content.sum().backward()
    assert seen.tokens.grad is not None and seen.tokens.grad.abs().max() > 0
    assert detector.selector.box.layers[-1].weight.grad is None, "the content does not say where"


def test_proposals_fall_linearly_in_training_and_the_copies_keep_the_last_number() -> None:
    detector = spread()
    images = torch.rand(1, 3, 96, 128)
    counts = []
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        detector.progress(fraction)
        outputs = detector(images)
        counts.append(outputs.logits.shape[2])
        assert outputs.encoder is not None and outputs.encoder[0].shape[1] == 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
    assert counts == [14, 12, 10, 8, 6]
    detector.progress(0.0)
    assert build("efficient_detr", CONFIG, CLASSES)(images).logits.shape[2] == KEPT  # what evaluation's copy does


def test_what_is_deployed_in_the_middle_of_training_has_the_last_number() -> None:
    detector = spread()
    detector.progress(0.0)
    assert DeployGraph(detector, 96, 128)(torch.zeros(1, 3, 96, 128))[0].shape[1] == KEPT


def test_both_parts_are_matched_one_to_one_with_the_true_classes() -> None:
    """The dense part's loss is that of a decoder layer with as many queries as cells, computed alone."""
    detector = spread()
    outputs = detector(torch.rand(1, 3, 96, 128))
    targets = [Target(torch.tensor([2, 1]), torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.5, 0.1, 0.3]]))]
    criterion = Criterion(TrainConfig(), "focal", getattr(detector.selector, "foreground", False))
    whole = criterion(outputs, targets)
    alone = criterion(
        replace(outputs, logits=outputs.encoder[0][None], boxes=outputs.encoder[1][None], encoder=None), targets
    )
    assert whole.encoder == pytest.approx(float(alone.total.detach()), rel=1e-5)


@torch.no_grad()
def test_a_decoder_that_starts_from_centers_learns_sizes_alone() -> None:
    detector = spread(replace(CONFIG, coordinates=2)).eval()
    seen = detector.encode(torch.rand(1, 3, 96, 128))
    queries = detector.select(seen)
    outputs = detector.decode(queries, seen)
    content = detector.decoder.layers[0](queries, seen)
    delta = detector.decoder.boxes.box[0](content)
    center = torch.log(queries.reference / (1 - queries.reference)) + delta[..., :2]
    torch.testing.assert_close(outputs.boxes[0, ..., :2], center.sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.boxes[0, ..., 2:], delta[..., 2:].sigmoid(), atol=1e-6, rtol=0)


def test_the_size_is_the_papers() -> None:
    """32 M with ResNet-50; the paper gives no number for the position's MLP, which is ours."""
    with torch.device("meta"):
        detector = build("efficient_detr", EfficientDetrConfig(), 91)
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(32, rel=0.04)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": 400}, "model.first_queries is 300, less than model.queries, 400"),
        ({"levels": 1}, "expected 3 to 5 levels"),
        ({"hidden": 100}, "expected a multiple of 4 and of 8 heads"),
    ],
)
def test_what_cannot_be_built_says_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        EfficientDetrConfig(**change)
