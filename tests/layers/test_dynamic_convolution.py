"""Predicted weights: box by box, channel by channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgedetr.layers.dynamic_convolution import DynamicInteraction, DynamicRelu, ScaleAttention, hard_sigmoid


@torch.no_grad()
def noisy(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with weights and norms that are all different."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_every_box_goes_through_the_weights_of_its_own_query(layers: int) -> None:
    dim, hidden, bins = 8, 3, 4
    made = noisy(DynamicInteraction(dim, bins, hidden, layers))
    content, features = torch.randn(2, 5, dim).double(), torch.randn(2, 5, bins, dim).double()
    expected = torch.zeros_like(content)
    for image in range(2):
        for query in range(5):
            predicted = made.weights.weight @ content[image, query] + made.weights.bias
            x = features[image, query]
            sizes = [(dim, hidden), (hidden, dim)] if layers == 2 else [(dim, dim)]
            for (inputs, outputs), norm in zip(sizes, made.norms):
                matrix, predicted = (
                    predicted[: inputs * outputs].reshape(inputs, outputs),
                    predicted[inputs * outputs :],
                )
                x = F.relu(F.layer_norm(x @ matrix, (outputs,), norm.weight, norm.bias))
            flat = torch.cat([x[cell] for cell in range(bins)])  # bin after bin
            mixed = made.out.weight @ flat + made.out.bias
            expected[image, query] = F.relu(F.layer_norm(mixed, (dim,), made.out_norm.weight, made.out_norm.bias))
            assert len(predicted) == 0
    torch.testing.assert_close(made(content, features), expected, atol=1e-12, rtol=0)  # float64


@torch.no_grad()
def test_dynamic_relu_is_the_larger_of_two_predicted_lines() -> None:
    made = noisy(DynamicRelu(8))
    x = torch.randn(2, 8, 15).double()
    other, actual = made([torch.randn(2, 8, 4).double(), x])
    assert other.shape == (2, 8, 4)
    for image in range(2):
        mean = x[image].mean(1)
        inner = F.relu(made.squeeze.weight @ mean + made.squeeze.bias)
        coefficients = ((made.excite.weight @ inner + made.excite.bias + 3).clamp(0, 6) / 6).reshape(4, 8)
        for channel in range(8):
            a1, b1 = (coefficients[0, channel] - 0.5) * 2 + 1, coefficients[1, channel] - 0.5
            a2, b2 = (coefficients[2, channel] - 0.5) * 2, coefficients[3, channel] - 0.5
            line = x[image, channel]
            torch.testing.assert_close(actual[image, channel], torch.maximum(line * a1 + b1, line * a2 + b2))


def test_dynamic_relu_that_learned_nothing_is_relu() -> None:
    made = DynamicRelu(8)
    torch.nn.init.zeros_(made.excite.weight)
    torch.nn.init.zeros_(made.excite.bias)
    x = torch.randn(2, 8, 15)
    torch.testing.assert_close(made([x])[0], F.relu(x), atol=1e-6, rtol=0)  # (0.5 + 3/6) is 1 but for rounding


@torch.no_grad()
def test_a_map_has_one_weight_by_its_mean() -> None:
    made = noisy(ScaleAttention(8))
    maps = [torch.randn(3, 8, cells).double() for cells in (20, 6, 1)]
    weights = made(maps)
    assert weights.shape == (3, 3, 1)
    for level, x in enumerate(maps):
        for image in range(3):
            score = (made.score.weight.flatten() * x[image].mean(1)).sum() + made.score.bias[0]
            torch.testing.assert_close(weights[image, level, 0], torch.clamp(F.relu(score) + 3, max=6) / 6)
    assert len(set(weights.flatten().tolist())) > 1


def test_hard_sigmoid_by_hand() -> None:
    x = torch.tensor([-4.0, -3.0, 0.0, 1.5, 3.0, 9.0])
    assert hard_sigmoid(x).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
