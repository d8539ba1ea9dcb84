"""RandAugment and random erasing: boxes follow their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgedetr.training.data.transforms import (
    COLORS,
    GEOMETRIES,
    OPERATIONS,
    Example,
    apply_operation,
    erase,
    move_boxes,
    rand_augment,
)

SIDE = 96


def square(x: int = 40, y: int = 36, w: int = 20, h: int = 16) -> Example:
    """One white box on black."""
    pixels = torch.zeros(3, SIDE, SIDE + 32, dtype=torch.uint8)
    pixels[:, y : y + h, x : x + w] = 255
    return Example(pixels, np.array([[x, y, x + w, y + h]], np.float64), np.array([1]))


def extent(pixels: torch.Tensor) -> np.ndarray:
    """x0, y0, x1, y1 of the pixels that are white by more than half (the padding's gray is darker than that)."""
    rows, columns = np.nonzero((pixels[0] > 140).numpy())
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float64)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_boxes_follow_the_pixels(name: str, sign: float) -> None:
    out = apply_operation(square(), name, 0.7, sign)
    # The box around the moved corners is the extent of the moved square, up to half a pixel that bilinear rounds off.
    np.testing.assert_allclose(out.boxes[0], extent(out.pixels), atol=1.5)
    assert np.abs(out.boxes - square().boxes).max() > 2, "something moved"
    assert out.labels.tolist() == [1]


@pytest.mark.parametrize("name", COLORS)
def test_colors_leave_boxes_and_change_pixels_by_strength(name: str) -> None:
    rng = np.random.default_rng(0)
    noisy = Example(
        torch.from_numpy(rng.integers(20, 200, (3, SIDE, SIDE), dtype=np.uint8)), square().boxes, np.array([1])
    )
    out = apply_operation(noisy, name, 0.9, 1.0)
    assert out.boxes is noisy.boxes
    assert out.pixels.shape == noisy.pixels.shape and out.pixels.dtype == torch.uint8
    assert not torch.equal(out.pixels, noisy.pixels)


def test_no_strength_is_no_geometry() -> None:
    for name in GEOMETRIES:
        np.testing.assert_allclose(apply_operation(square(), name, 0.0, 1.0).boxes, square().boxes)
        assert torch.equal(apply_operation(square(), name, 0.0, 1.0).pixels, square().pixels)


def test_a_box_with_less_than_a_fifth_of_its_area_left_is_dropped() -> None:
    shift = np.array([[1, 0, -55.0], [0, 1, 0], [0, 0, 1]])
    boxes = np.array([[40.0, 10, 60, 30], [30, 10, 70, 30], [50, 10, 90, 30]])  # keep 1/4, 3/8, 7/8 of the width
    seen, keep = move_boxes(boxes, shift, 128, 96)
    np.testing.assert_allclose(seen[:, [0, 2]], [[0, 5], [0, 15], [0, 35]])
    assert keep.tolist() == [True, True, True]
    _, keep = move_boxes(boxes, shift - [[0, 0, 2], [0, 0, 0], [0, 0, 0]], 128, 96)  # the first keeps 3 of 20
    assert keep.tolist() == [False, True, True]


def test_every_operation_is_drawn_and_numbers_of_them_add_up() -> None:
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        seen |= {str(name) for name in rng.choice(OPERATIONS, 2)}
    assert seen == set(OPERATIONS) and len(OPERATIONS) == 14  # as many as the paper lists
    a, b = (rand_augment(square(), 2, 9, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(a.pixels, b.pixels), "the same generator, the same image"


def test_erasing_stays_within_its_limits_and_drops_hidden_boxes() -> None:
    dropped = 0
    for seed in range(60):
        before = square(10, 10, 30, 30)
        after = erase(before, np.random.default_rng(seed))
        changed = (after.pixels != before.pixels).any(0).numpy()
        assert 0.015 < changed.mean() < 0.34  # of the area: 0.02 to 0.33, less where noise repeats the pixel
        hidden = changed[10:40, 10:40].mean()
        assert len(after.boxes) == len(after.labels) == (0 if hidden > 0.81 else 1), hidden
        dropped += not len(after.boxes)
    assert dropped > 0
