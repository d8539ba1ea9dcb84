"""Conditional attention against loops over queries, heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch

from edgedetr.layers.conditional_attention import ConditionalAttention, ConditionalSelfAttention, SpatialQuery
from edgedetr.layers.position import sine_of_boxes

DIM, HEADS = 8, 2
EACH = DIM // HEADS


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden) -> torch.Tensor:
    """q [N, M, E], k [S, M, E], v [S, M, D] -> [N, M D]; hidden(n, s): that pair is masked."""
    rows = []
    for n in range(len(q)):
        row = []
        for head in range(q.shape[1]):
            scores = [-1e30 if hidden(n, s) else float(q[n, head] @ k[s, head]) * scale for s in range(len(k))]
            row.append(sum(weight * v[s, head] for s, weight in enumerate(softmax(scores))))
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_cross_attention_compares_content_with_content_and_position_with_position(first: bool) -> None:
    torch.manual_seed(0)
    layer = ConditionalAttention(DIM, HEADS, first=first).double()
    content, position, spatial = (torch.randn(2, 3, DIM).double() for _ in range(3))
    tokens, memory_position = torch.randn(2, 5, DIM).double(), torch.randn(1, 5, DIM).double()
    padding = torch.tensor([[False] * 5, [False, True, False, False, True]])
    got = layer(content, position, spatial, tokens, memory_position, padding)
    for image in range(2):
        q, k, where = layer.q(content[image]), layer.k(tokens[image]), layer.k_position(memory_position[0])
        if first:
            q, k = q + layer.q_position(position[image]), k + where
        heads = (x.unflatten(-1, (HEADS, EACH)) for x in (q, k, layer.q_spatial(spatial[image]), where))
        q, k, position_q, position_k = heads
        # The original concatenates per head, so that the scale is of twice the channels of a head.
        expected = by_hand(
            torch.cat([q, position_q], -1),
            torch.cat([k, position_k], -1),
            layer.v(tokens[image]).unflatten(-1, (HEADS, EACH)),
            (2 * EACH) ** -0.5,
            lambda n, s, row=padding[image]: bool(row[s]),
        )
        torch.testing.assert_close(got[image], layer.out(expected), atol=1e-12, rtol=0)  # float64


@torch.no_grad()
def test_self_attention_sums_what_it_projects_apart() -> None:
    torch.manual_seed(1)
    layer = ConditionalSelfAttention(DIM, HEADS).double()
    content, position = torch.randn(1, 4, DIM).double(), torch.randn(1, 4, DIM).double()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:, :2] = True
    q = (layer.q(content) + layer.q_position(position))[0].unflatten(-1, (HEADS, EACH))
    k = (layer.k(content) + layer.k_position(position))[0].unflatten(-1, (HEADS, EACH))
    expected = by_hand(
        q, k, layer.v(content)[0].unflatten(-1, (HEADS, EACH)), EACH**-0.5, lambda n, s: bool(mask[n, s])
    )
    torch.testing.assert_close(layer(content, position, mask)[0], layer.out(expected), atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_box_is_four_waves_y_before_x() -> None:
    """Every number times 2 pi, over 10000 to the even fraction of the channel, alternating sine and cosine."""
    box, width = torch.tensor([0.3, 0.7, 0.1, 0.2], dtype=torch.float64), 6
    expected = []
    for number in (0.7, 0.3, 0.1, 0.2):
        for channel in range(width):
            angle = number * 2 * math.pi / 10000 ** (2 * (channel // 2) / width)
            expected.append(math.sin(angle) if channel % 2 == 0 else math.cos(angle))
    torch.testing.assert_close(sine_of_boxes(box, width), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(sine_of_boxes(box[:2], width), torch.tensor(expected[: 2 * width], dtype=torch.float64))


@torch.no_grad()
def test_the_spatial_query_is_scaled_by_content_and_by_size_per_axis() -> None:
    torch.manual_seed(2)
    query = SpatialQuery(DIM, sized=True).double()
    content, reference = torch.randn(1, 2, DIM).double(), torch.rand(1, 2, 4).double() * 0.5 + 0.2
    wave = sine_of_boxes(reference[..., :2], DIM // 2)
    for layer in (0, 1):
        got = query(layer, content, reference)
        wanted = query.size(content).sigmoid()
        for n in range(2):
            for channel in range(DIM):
                scale = query.scale(content)[0, n, channel] if layer else 1.0  # the first layer takes T = 1
                axis = 1 if channel < DIM // 2 else 0  # the first half is y: height
                ratio = wanted[0, n, axis] / reference[0, n, 2 + axis]
                assert float(got[0, n, channel]) == pytest.approx(float(wave[0, n, channel] * scale * ratio), abs=1e-12)


@torch.no_grad()
def test_a_box_without_area_keeps_the_spatial_query_finite() -> None:
    query = SpatialQuery(DIM, sized=True)
    assert torch.isfinite(query(1, torch.randn(1, 1, DIM), torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]))).all()


@pytest.mark.parametrize("first", [True, False])
def test_one_position_for_all_images_is_that_position_for_each_also_in_gradients(first: bool) -> None:
    torch.manual_seed(4)
    among = ConditionalSelfAttention(DIM, HEADS).double()
    across = ConditionalAttention(DIM, HEADS, first=first).double()
    content, tokens = torch.randn(3, 4, DIM).double(), torch.randn(3, 5, DIM).double()
    memory_position = torch.randn(1, 5, DIM).double()
    shared = [torch.randn(1, 4, DIM).double().requires_grad_() for _ in range(2)]
    repeated = [x.detach().repeat(3, 1, 1).requires_grad_() for x in shared]

    def step(position: torch.Tensor, spatial: torch.Tensor) -> list[torch.Tensor]:
        got = across(among(content, position), position, spatial, tokens, memory_position)
        weights = [*among.parameters(), *across.parameters()]
        return [got, *torch.autograd.grad((got * torch.arange(DIM)).sum(), [position, spatial, *weights])]

    got, expected = step(*shared), step(*repeated)
    expected[1:3] = [gradient.sum(0, keepdim=True) for gradient in expected[1:3]]  # of position and spatial
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)  # float64
