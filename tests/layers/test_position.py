"""Positions: values from their formulas, and what padding does to them."""

from __future__ import annotations

import math

import pytest
import torch

from edgedetr.errors import ModelError
from edgedetr.layers.position import GridPosition, LearnedPosition, NoPosition, SequencePosition, SinePosition

LIKE = torch.zeros(1, 6, 16)
SHAPE = (2, 3)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_sine_position_is_y_then_x_in_interleaved_sines(offset: float) -> None:
    got = SinePosition(16, offset=offset)(LIKE, SHAPE)[0]
    for row in range(2):
        for column in range(3):
            for part, position in enumerate([(row + 1 - offset) / (2 + 1e-6), (column + 1 - offset) / (3 + 1e-6)]):
                for channel in range(8):
                    angle = position * 2 * math.pi / 10000 ** (channel // 2 * 2 / 8)
                    wave = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
                    # float32 division of angles up to 2 pi
                    assert got[row * 3 + column, part * 8 + channel].item() == pytest.approx(wave, abs=2e-6)


def test_sine_position_counts_only_unmasked_cells() -> None:
    padding = torch.zeros(1, 4, 5, dtype=torch.bool)
    padding[:, 2:], padding[:, :, 3:] = True, True
    inside = SinePosition(16)(LIKE, (4, 5), padding)[0].view(4, 5, 16)[:2, :3]
    torch.testing.assert_close(inside.flatten(0, 1), SinePosition(16)(LIKE, SHAPE)[0])


def test_grid_position_is_sin_cos_of_row_then_column() -> None:
    got = GridPosition(16)(LIKE, SHAPE)[0]
    for row in range(2):
        for column in range(3):
            waves = [1 / 10000 ** (k / 4) for k in range(4)]
            expected = [f(position * w) for position in (row, column) for f in (math.sin, math.cos) for w in waves]
            assert got[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)  # float64 inside, float32 out


def test_learned_position_is_the_columns_vector_then_the_rows() -> None:
    position = LearnedPosition(16, cells=4)
    got = position(LIKE, SHAPE)[0]
    assert torch.equal(got[5], torch.cat([position.column.weight[2], position.row.weight[1]]))


def test_the_others_have_their_shapes() -> None:
    assert SequencePosition(16, 10)(LIKE, SHAPE).shape == (1, 6, 16)
    assert torch.equal(LIKE + NoPosition()(LIKE, SHAPE), LIKE)


@pytest.mark.parametrize(
    "position, shape",
    [(LearnedPosition(16, cells=4), (5, 2)), (LearnedPosition(16), (2, 51)), (SequencePosition(16, 10), (3, 4))],
)
def test_maps_beyond_the_learned_positions_are_refused(position: torch.nn.Module, shape: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match=rf"the map has {shape[0]} x {shape[1]}.*model.position=sine"):
        position(LIKE, shape)
