"""Mosaic, mixup and cutmix: a box holds the visible part of its object and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgedetr.bundle import InputContract
from edgedetr.training.config import AugmentConfig
from edgedetr.training.data.transforms import (
    Example,
    SourceImage,
    affine_mosaic,
    cutmix,
    draw_rectangle,
    mixup,
    mosaic,
    shrink_beside,
    transform,
)

STILL = AugmentConfig(flip_horizontal=0, crop=0, zoom_out=0, scale_jitter=0, color=0)


def example(value: int, box: tuple[float, ...], label: int, height: int = 60, width: int = 80) -> Example:
    return Example(torch.full((3, height, width), value, dtype=torch.uint8), np.array([box]), np.array([label]))


def test_mosaic_puts_four_images_into_four_corners_with_their_boxes() -> None:
    asked: list[tuple[int, int]] = []

    def take(size: InputContract) -> Example:
        asked.append((size.height, size.width))
        return example(50 * len(asked), (0.0, 0.0, size.width, size.height / 2), len(asked), size.height, size.width)

    made = mosaic(take, InputContract(60, 80), np.random.default_rng(1))
    assert len(asked) == 4
    assert asked[0][0] + asked[2][0] == 60 and asked[0][1] + asked[1][1] == 80
    for label, (x0, y0, x1, y1) in zip(made.labels, made.boxes.astype(int)):
        assert (made.pixels[:, y0:y1, x0:x1] == 50 * label).all(), "a box holds pixels of its own image"
    assert sorted(made.labels) == [1, 2, 3, 4]
    assert set(made.pixels.unique().tolist()) == {50, 100, 150, 200}


def color(number: int) -> list[int]:
    """Of the bits of a number: no blend of two of them, or of one and the background, is a third."""
    return [250 if number >> bit & 1 else 10 for bit in range(3)]


def marked(number: int) -> SourceImage:
    """60 x 80 dark pixels, and a square of 20 in a color of its own at (30, 20), which is the object."""
    pixels = torch.full((3, 60, 80), 10, dtype=torch.uint8)
    pixels[:, 20:40, 30:50] = torch.tensor(color(number), dtype=torch.uint8)[:, None, None]
    return SourceImage(pixels, np.array([[30.0, 20, 50, 40]]), np.array([number]), 60.0, 80.0)


@pytest.mark.parametrize(
    ("degrees", "shift", "scale"), [(0, 0.0, 1.0), (0, 0.0, 0.5), (10, 0.1, 1.3), (180, 0.05, 0.8)]
)
def test_deims_mosaic_moves_four_whole_images_and_their_boxes_as_one(
    degrees: float, shift: float, scale: float
) -> None:
    moved = replace(STILL, mosaic_degrees=degrees, mosaic_shift=shift, mosaic_scale=(scale, scale), min_visible=0.99)
    for seed in range(5):
        made = affine_mosaic(
            [marked(n) for n in (1, 2, 3, 4)], InputContract(120, 160), moved, np.random.default_rng(seed)
        )
        assert made.pixels.shape == (3, 120, 160)
        for label, (x0, y0, x1, y1) in zip(made.labels, made.boxes):
            distance = made.pixels.float() - torch.tensor(color(int(label)), dtype=torch.float32)[:, None, None]
            rows, columns = np.nonzero((distance.abs().amax(0) < 60).numpy())
            seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(seen - [x0, y0, x1, y1]).max() <= 2.5  # bilinear pixels at the rim of a turned square
        if not degrees and not shift:
            quarter = [np.array([30, 20, 50, 40]) + [x, y, x, y] for y in (0, 60) for x in (0, 80)]
            center = np.array([80, 60, 80, 60])
            assert made.boxes.tolist() == [((box - center) * scale + center).tolist() for box in quarter]


def test_deims_mosaic_starts_with_the_image_itself_and_is_blended_with_another() -> None:
    config = replace(STILL, mosaic=1.0, mosaic_kind="affine", mosaic_degrees=0.0, mosaic_shift=0.0, mosaic_scale=(1, 1))
    labels = iter(range(2, 9))

    def made(**settings: object) -> Example:
        return transform(
            marked(1), lambda: marked(next(labels)), InputContract(120, 160), replace(config, **settings), rng
        )

    rng = np.random.default_rng(0)
    assert made().labels.tolist() == [1, 2, 3, 4]
    assert made(mixup=1.0, mosaic=0.0).labels.tolist() == [1, 5]
    alone = transform(marked(1), pytest.fail, InputContract(120, 160), replace(config, mixup=1.0), rng, mixes=False)
    assert alone.labels.tolist() == [1]


def test_mixup_blends_pixels_and_keeps_the_objects_of_both() -> None:
    made = mixup(example(200, (0, 0, 9, 9), 1), example(100, (5, 5, 20, 20), 2), 0.7)
    assert made.pixels.unique().tolist() == [170]
    assert made.boxes.tolist() == [[0, 0, 9, 9], [5, 5, 20, 20]]
    assert made.labels.tolist() == [1, 2]


def test_cutmix_pastes_clips_and_drops() -> None:
    base = Example(
        torch.zeros(3, 60, 80, dtype=torch.uint8),
        np.array(
            [
                [30.0, 20, 50, 40],  # inside the paste: gone
                [0, 25, 40, 35],  # its right end is under the paste: ends at 20
                [10, 10, 30, 50],  # bitten, but not across: whole
                [0, 0, 10, 10],  # outside: whole
            ]
        ),
        np.array([0, 1, 2, 3]),
    )
    donor = Example(
        torch.full((3, 60, 80), 255, dtype=torch.uint8),
        np.array(
            [
                [25.0, 20, 45, 40],  # inside
                [50, 20, 70, 40],  # half in: clipped to 60
                [58, 20, 78, 40],  # a tenth in: not taken
            ]
        ),
        np.array([7, 8, 9]),
    )
    made = cutmix(base, donor, (20, 15, 60, 45))
    assert made.boxes.tolist() == [
        [0, 25, 20, 35],
        [10, 10, 30, 50],
        [0, 0, 10, 10],
        [25, 20, 45, 40],
        [50, 20, 60, 40],
    ]
    assert made.labels.tolist() == [1, 2, 3, 7, 8]
    inside = torch.zeros(60, 80, dtype=torch.bool)
    inside[15:45, 20:60] = True
    assert ((made.pixels[0] == 255) == inside).all()


def test_a_covered_box_shrinks_to_the_extent_of_its_uncovered_pixels() -> None:
    """Against counting pixels, for many boxes and holes."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = rng.integers(0, 20, 2)
        box = np.concatenate([low, low + rng.integers(3, 15, 2)])
        hole_low = rng.integers(0, 20, 2)
        hole = np.concatenate([hole_low, hole_low + rng.integers(3, 25, 2)])
        grid = np.zeros((60, 60), bool)
        grid[box[1] : box[3], box[0] : box[2]] = True
        grid[hole[1] : hole[3], hole[0] : hole[2]] = False
        left = shrink_beside(box[None].astype(float), hole.astype(float))[0]
        if not grid.any():
            assert (left[2:] <= left[:2]).any(), "nothing is left, and the box has no area"
            continue
        rows, columns = np.nonzero(grid)
        assert left.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_drawn_rectangles_are_in_the_image() -> None:
    for seed in range(50):
        x0, y0, x1, y1 = draw_rectangle(60, 80, np.random.default_rng(seed))
        assert 0 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 60


@pytest.mark.parametrize("technique, images", [("mosaic", 4), ("mixup", 1), ("cutmix", 1)])
def test_a_technique_that_is_on_takes_other_images(technique: str, images: int) -> None:
    taken: list[int] = []

    def source(value: int) -> SourceImage:
        return SourceImage(
            torch.full((3, 60, 80), value, dtype=torch.uint8),
            np.array([[5.0, 5, 60, 50]]),
            np.array([0]),
            frame_height=60,
            frame_width=80,
        )

    def another() -> SourceImage:
        taken.append(1)
        return source(200)

    on = AugmentConfig(flip_horizontal=0, crop=0, zoom_out=0, scale_jitter=0, color=0, **{technique: 1.0})
    made = transform(source(100), another, InputContract(60, 80), on, np.random.default_rng(0))
    assert len(taken) == images
    assert (made.pixels != 100).any()
    if technique != "cutmix":  # of which a part of the other object may be too little
        assert len(made.boxes) == (4 if technique == "mosaic" else 2)
    taken.clear()
    plain = transform(source(100), another, InputContract(60, 80), STILL, np.random.default_rng(0))
    assert not taken and (plain.pixels == 100).all()
