"""Deformable attention: a triple loop, both ways to sample, borders, and where the points start."""

from __future__ import annotations

import math

import pytest
import torch

from edgedetr.layers.deformable_attention import DeformableAttention

SHAPES = [(4, 6), (2, 3), (1, 2)]  # rectangular, down to a single row
POINTS = [4, 2, 3]
TOKENS = sum(h * w for h, w in SHAPES)


def layer(sampling: str, method: str = "default") -> DeformableAttention:
    torch.manual_seed(0)
    made = DeformableAttention(16, 2, POINTS, sampling, method).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return made


def inputs(coordinates: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, references that reach well outside 0..1, tokens."""
    torch.manual_seed(1)
    query, tokens = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, TOKENS, 16, dtype=torch.float64)
    reference = torch.rand(2, 9, coordinates, dtype=torch.float64) * 2 - 0.5
    reference[0, 0, :2] = 0.0  # exactly on the corners of the image
    reference[0, 1, :2] = 1.0
    return query, reference, tokens


def by_loops(
    made: DeformableAttention, query: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """One cell at a time, from the paper's equation 3; a cell outside the map counts as zero."""
    value = made.value(tokens)
    out = torch.zeros_like(query)
    total, dim = sum(POINTS), 8
    for b in range(query.shape[0]):
        for n in range(query.shape[1]):
            offsets = made.offsets(query[b, n]).view(2, total, 2)
            weights = made.weights(query[b, n]).view(2, total).softmax(-1)
            for m in range(2):
                p = start = 0
                for (height, width), count in zip(SHAPES, POINTS):
                    for _ in range(count):
                        if reference.shape[-1] == 4:
                            reach = reference[b, n, 2:] * 0.5 / count
                        else:
                            reach = torch.tensor([1 / width, 1 / height], dtype=torch.float64)
                        x, y = (reference[b, n, :2] + offsets[m, p] * reach).tolist()
                        if made.method == "discrete":
                            i = min(max(math.floor(x * width + 0.5), 0), width - 1)
                            j = min(max(math.floor(y * height + 0.5), 0), height - 1)
                            cells = [(i, j, 1.0)]
                        else:
                            x, y = x * width - 0.5, y * height - 0.5
                            i, j = math.floor(x), math.floor(y)
                            cells = [
                                (i + di, j + dj, (1 - abs(x - i - di)) * (1 - abs(y - j - dj)))
                                for di in (0, 1)
                                for dj in (0, 1)
                            ]
                        for i, j, fraction in cells:
                            if 0 <= i < width and 0 <= j < height:
                                row = value[b, start + j * width + i, m * dim : (m + 1) * dim]
                                out[b, n, m * dim : (m + 1) * dim] += weights[m, p] * fraction * row
                        p += 1
                    start += height * width
    return made.out(out)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(
    "sampling, method", [("gather", "default"), ("grid_sample", "default"), ("gather", "discrete")]
)
@torch.no_grad()
def test_equals_the_equation_cell_by_cell(sampling: str, method: str, coordinates: int) -> None:
    made = layer(sampling, method)
    query, reference, tokens = inputs(coordinates)
    torch.testing.assert_close(made(query, reference, tokens, SHAPES), by_loops(made, query, reference, tokens))


def test_gather_and_grid_sample_agree_in_value_and_gradient() -> None:
    results = []
    for sampling in ("gather", "grid_sample"):
        made, tensors = layer(sampling), [x.requires_grad_() for x in inputs()]
        out = made(*tensors, SHAPES)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in tensors), *(p.grad for p in made.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sampling", ["gather", "grid_sample"])
@torch.no_grad()
def test_padded_tokens_read_as_zero(sampling: str) -> None:
    made = layer(sampling)
    query, reference, tokens = inputs()
    padding = torch.rand(2, TOKENS) < 0.5
    changed = torch.where(padding[..., None], torch.randn_like(tokens) * 9, tokens)
    before, after = (made(query, reference, memory, SHAPES, padding) for memory in (tokens, changed))
    torch.testing.assert_close(before, after)
    assert not torch.equal(before, made(query, reference, tokens, SHAPES))


def test_points_start_on_squares_around_the_reference() -> None:
    """Eight heads look in the eight directions; point k is on the square of radius k (Deformable DETR, A.4)."""
    bias = DeformableAttention(64, 8, [4, 4]).offsets.bias.detach().view(8, 2, 4, 2)
    directions = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    expected = directions[:, None, None] * torch.arange(1.0, 5)[:, None]
    torch.testing.assert_close(bias, expected.expand(8, 2, 4, 2), atol=1e-5, rtol=0)  # float32 sines, times 4
