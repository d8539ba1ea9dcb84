"""Row-column attention against loops over columns and rows, and its memory."""

from __future__ import annotations

import pytest
import torch

from edgedetr.layers import row_column_attention
from edgedetr.layers.row_column_attention import AxisPosition, RowColumnAttention

DIM, HEADS = 8, 2
EACH = DIM // HEADS


def by_loops(
    layer: RowColumnAttention,
    x: torch.Tensor,
    y: torch.Tensor,
    maps: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    width: int,
    height: int,
) -> torch.Tensor:
    """One image, of which `width` columns and `height` rows are real. x, y [N, C], maps [H, W, C] -> [N, C].

    As the paper has it: keys are projected cell by cell with their position, then averaged along the other axis.
    """
    keys_x = [sum(layer.k_x(maps[h, w] + columns[w]) for h in range(height)) / height for w in range(width)]
    keys_y = [sum(layer.k_y(maps[h, w] + rows[h]) for w in range(width)) / width for h in range(height)]
    q_x, q_y = layer.q_x(x), layer.q_y(y)
    result = []
    for n in range(len(x)):
        heads = []
        for head in range(HEADS):
            part = slice(head * EACH, (head + 1) * EACH)
            a_x = torch.stack([q_x[n, part] @ key[part] for key in keys_x]).div(EACH**0.5).softmax(0)
            a_y = torch.stack([q_y[n, part] @ key[part] for key in keys_y]).div(EACH**0.5).softmax(0)
            total = torch.zeros(EACH, dtype=maps.dtype)
            for h in range(height):
                for w in range(width):
                    total = total + a_y[h] * a_x[w] * layer.v(maps[h, w])[part]
            heads.append(total)
        result.append(layer.out(torch.cat(heads)))
    return torch.stack(result)


def inputs(shape: tuple[int, int], batch: int = 2, queries: int = 3):
    torch.manual_seed(0)
    layer, position = RowColumnAttention(DIM, HEADS).double(), AxisPosition(DIM).double()
    tokens = torch.randn(batch, shape[0] * shape[1], DIM).double()
    return layer, position, torch.randn(batch, queries, DIM).double(), torch.randn(batch, queries, DIM).double(), tokens


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3)], ids=["wide", "tall", "square"])
@torch.no_grad()
def test_every_order_of_the_axes_is_the_double_sum(shape: tuple[int, int]) -> None:
    layer, position, x, y, tokens = inputs(shape)
    axes = position(tokens, shape)
    got = layer(x, y, tokens, axes, shape)
    for image in range(2):
        expected = by_loops(
            layer, x[image], y[image], tokens[image].unflatten(0, shape), axes[0][0], axes[1][0], shape[1], shape[0]
        )
        torch.testing.assert_close(got[image], expected, atol=1e-12, rtol=0)  # float64


@torch.no_grad()
def test_padding_is_neither_attended_nor_averaged() -> None:
    shape, real = (3, 5), [(3, 5), (2, 4)]  # the second image fills two rows and four columns
    layer, position, x, y, tokens = inputs(shape)
    padding = torch.ones(2, *shape, dtype=torch.bool)
    for image, (height, width) in enumerate(real):
        padding[image, :height, :width] = False
    axes = position(tokens, shape, padding)
    got = layer(x, y, tokens, axes, shape, padding.flatten(1))
    for image, (height, width) in enumerate(real):
        own = position(tokens, (height, width))
        torch.testing.assert_close(axes[0][image, :width], own[0][0])  # positions count real cells only
        expected = by_loops(
            layer, x[image], y[image], tokens[image].unflatten(0, shape), axes[0][image], axes[1][image], width, height
        )
        torch.testing.assert_close(got[image], expected, atol=1e-12, rtol=0)
    garbage = torch.where(padding.flatten(1)[..., None], torch.randn_like(tokens) * 9, tokens)
    torch.testing.assert_close(layer(x, y, garbage, axes, shape, padding.flatten(1)), got, atol=1e-12, rtol=0)


@torch.no_grad()
def test_queries_in_parts_give_the_same_and_no_part_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (4, 6)
    layer, position, x, y, tokens = inputs(shape, queries=11)
    axes = position(tokens, shape)
    whole = layer(x, y, tokens, axes, shape)
    sizes, part = [], row_column_attention._part

    def spy(first: torch.Tensor, second: torch.Tensor, rows: torch.Tensor, short: int) -> torch.Tensor:
        sizes.append(first.shape[1] * first.shape[2] * rows.shape[3])  # numbers of one image between
        return part(first, second, rows, short)

    allowed = 2 * HEADS * 4 * EACH  # two queries at once
    monkeypatch.setattr(row_column_attention, "LARGEST", allowed)
    monkeypatch.setattr(row_column_attention, "_part", spy)
    torch.testing.assert_close(layer(x, y, tokens, axes, shape), whole, atol=1e-12, rtol=0)
    assert len(sizes) == 6
    assert max(sizes) == allowed


@torch.no_grad()
def test_the_product_between_the_sums_is_as_long_as_the_shorter_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    part = row_column_attention._part
    monkeypatch.setattr(row_column_attention, "_part", lambda *given: (seen.append(given[3]), part(*given))[1])
    for shape in ((2, 7), (7, 2)):
        layer, position, x, y, tokens = inputs(shape)
        layer(x, y, tokens, position(tokens, shape), shape)
    assert seen == [2, 2]
