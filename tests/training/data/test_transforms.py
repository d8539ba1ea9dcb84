"""Augmentation: a drawn rectangle and its box must match after every augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from edgedetr.bundle import ClassInfo, InputContract
from edgedetr.data.detection_set import DetectionSet, Sample
from edgedetr.runtime.preprocess import resize
from edgedetr.training.config import AugmentConfig
from edgedetr.training.data.dataset import SampleKey, TrainingSet, batches, draw_sizes, epoch_order, load
from edgedetr.training.data.transforms import SourceImage, augment, recolor

STILL = AugmentConfig(flip_horizontal=0, crop=0, zoom_out=0, scale_jitter=0, color=0)
KINDS = {
    "still": STILL,
    "horizontal flip": replace(STILL, flip_horizontal=1.0),
    "vertical flip": replace(STILL, flip_vertical=1.0),
    "crop": replace(STILL, crop=1.0),
    "zoom out": replace(STILL, zoom_out=1.0, zoom_out_scale=3.0),
    "scale jitter": replace(STILL, scale_jitter=0.5),
    "all": AugmentConfig(flip_vertical=0.5, crop=0.5, zoom_out=0.5, scale_jitter=0.3, color=0),
}


def drawn(rng: np.random.Generator, height: int, width: int, letterbox: InputContract | None = None) -> SourceImage:
    """Black, with one white rectangle."""
    x0, y0 = rng.integers(5, width // 2), rng.integers(5, height // 2)
    x1, y1 = rng.integers(x0 + 20, width - 4), rng.integers(y0 + 20, height - 4)
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[:, y0:y1, x0:x1] = 255
    frame = [float(height), float(width)]
    if letterbox is not None:
        scale = min(letterbox.height / height, letterbox.width / width)
        frame = [letterbox.height / scale, letterbox.width / scale]
    return SourceImage(pixels, np.array([[x0, y0, x1, y1]], float), np.array([1]), *frame)


@pytest.mark.parametrize("form", ["stretch", "letterbox"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_box_bounds_the_drawn_rectangle_within_a_pixel(kind, form, rng):
    contract = InputContract(96, 128, form)
    seen = 0
    for _ in range(25):
        source = drawn(rng, 150, 130, contract if form == "letterbox" else None)
        found = augment(source, contract, KINDS[kind], rng)
        pixels, boxes, labels = found.pixels, found.boxes, found.labels
        assert pixels.shape == (3, 96, 128) and pixels.dtype == torch.uint8
        if not len(boxes):
            continue
        seen += 1
        assert labels.tolist() == [1]
        rows, columns = (pixels[0] > 150).nonzero(as_tuple=True)  # above the gray of the padding (114)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(boxes[0] - np.array(found, float)).max() <= 1.0
    assert seen >= 15  # of 25; a crop may leave too little of the rectangle


def test_without_augmentation_the_image_is_the_one_that_resize_gives(rng, tmp_path):
    for number, (contract, size) in enumerate(
        [
            (InputContract(64, 64), (50, 70)),
            (InputContract(64, 64), (300, 215)),
            (InputContract(64, 96, "letterbox"), (300, 215)),
        ]
    ):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(image).save(path)
        box = np.array([[10.0, 12.0, 40.0, 45.0]])
        sample = Sample(1, path, *size, box, np.array([0]), np.array([False]), np.array([1.0]))
        found = augment(load(sample, contract), contract, STILL, rng, flips_only=True)
        pixels, boxes = found.pixels, found.boxes
        expected, geometry = resize(image, contract, backend="numpy")
        difference = np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - expected)
        # Two roundings to whole levels, of the mean and of the interpolation, instead of one.
        assert difference.max() <= 2 and (difference > 1).mean() < 0.01
        np.testing.assert_allclose(boxes, box / geometry.to_source(np.ones(4)), atol=1e-9)


def test_boxes_with_little_area_left_are_dropped(rng):
    source = SourceImage(
        torch.zeros(3, 100, 100, dtype=torch.uint8),
        np.array([[0, 0, 10, 10], [80, 80, 100, 100.0]]),
        np.array([0, 1]),
        100.0,
        100.0,
    )
    config = replace(STILL, crop=1.0, crop_scale=(0.4, 0.4), crop_aspect=(1.0, 1.0), min_visible=0.9)
    for _ in range(20):
        found = augment(source, InputContract(100, 100), config, rng)
        boxes, labels = found.boxes, found.labels
        assert len(boxes) <= 1  # the two are further apart than a crop is wide
        for box, label in zip(boxes, labels):
            whole = 625 if label == 0 else 2500  # their areas, 2.5 times longer on each side
            assert (box[2] - box[0]) * (box[3] - box[1]) >= 0.85 * whole


def test_color_keeps_gray_gray_under_saturation_and_hue_and_scales_under_brightness(rng):
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    only = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    turned = recolor(gray, AugmentConfig(**{**only, "saturation": 0.9, "hue": 0.5}), rng)
    assert (turned.int() - 100).abs().max() <= 1  # the YIQ matrix is given to three digits
    bright = recolor(gray, AugmentConfig(**{**only, "brightness": 0.5}), np.random.default_rng(1))
    factor = 1 + np.random.default_rng(1).uniform(-0.5, 0.5)
    assert (bright.float() - 100 * factor).abs().max() <= 1
    assert torch.equal(recolor(gray, AugmentConfig(**only), rng), gray)


@pytest.fixture
def rendered(tmp_path, rng) -> DetectionSet:
    samples = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(path)
        samples.append(
            Sample(
                number,
                path,
                80,
                90,
                np.array([[5.0, 6, 50, 60], [30, 30, 80, 70]]),
                np.array([0, 1]),
                np.array([False, number == 3]),
                np.array([1.0, 1.0]),
            )
        )
    return DetectionSet("train", tmp_path, tuple(samples), (ClassInfo(0, 1, "a"), ClassInfo(1, 7, "b")))


def training_set(samples: DetectionSet, cache_mb: int) -> TrainingSet:
    return TrainingSet(samples, InputContract(32, 32), AugmentConfig(), seed=5, cache_mb=cache_mb)


def test_batches_are_the_same_with_and_without_workers_and_cache(rendered):
    plan = epoch_order(len(rendered), 3, seed=5, epoch=2)
    sets = [(training_set(rendered, 0), 0), (training_set(rendered, 64), 0), (training_set(rendered, 64), 2)]
    runs = [list(batches(data, plan, 2, workers=workers)) for data, workers in sets]
    for run in runs[1:]:
        for ours, theirs in zip(runs[0], run):
            assert torch.equal(ours.images, theirs.images) and ours.indices == theirs.indices
            assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(ours.targets, theirs.targets))
    other = list(batches(sets[1][0], plan, 3, workers=0))
    assert not torch.equal(other[0].images, runs[0][0].images)


def test_crowd_regions_are_not_learned(rendered):
    config = replace(STILL, color=0)
    data = TrainingSet(rendered, InputContract(32, 32), config, seed=0, cache_mb=1)
    assert [len(data[SampleKey(0, index, True)][1]) for index in (2, 3)] == [2, 1]


def test_drawn_sizes_are_multiples_of_what_the_model_reads():
    """By hand: 0.75 and 1.25 of 560 x 448 px, patches of 14 px in 4 windows per side."""
    contract = InputContract(560, 448)
    sizes = draw_sizes(contract, [0.75, 1.0, 1.25], 50, multiple=56, seed=0, epoch=0)
    # 420 / 56 = 7.5, of which Python's round takes the even side, 8; 336 = 6 x 56; 700 = 12.5 x 56; 560 = 10 x 56
    assert {(size.height, size.width) for size in sizes} == {(448, 336), (560, 448), (672, 560)}


def test_an_epoch_shows_each_image_once_and_epochs_differ():
    plan = epoch_order(100, 8, seed=1, epoch=0)
    assert plan.shape == (12, 8) and len(set(plan.ravel().tolist())) == 96
    assert plan.tolist() != epoch_order(100, 8, seed=1, epoch=1).tolist()
    assert sorted(set(epoch_order(3, 8, seed=1, epoch=0).ravel().tolist())) == [0, 1, 2]


def test_an_image_that_cannot_be_decoded_is_replaced_by_the_next_and_named(rendered, caplog):
    rendered.samples[2].path.write_bytes(b"\x89PNG broken")
    _, target, index = training_set(rendered, 1)[SampleKey(0, 2, True)]
    assert index == 3 and len(target) == 1
    assert "2.png" in caplog.text


def test_a_crop_by_size_is_detrs(rng):
    """Sides of 384 to 600 px where the shorter side of the image has 400, 500 or 600 px, anywhere in the image."""
    from edgedetr.training.data.transforms import _crop_by_size

    frame = np.array([640.0, 480.0])
    windows = np.array([_crop_by_size(frame, rng) for _ in range(3000)])
    assert (windows[:, :2] >= 0).all() and (windows[:, 2:] <= frame).all()
    side = (windows[:, 2:] - windows[:, :2]) / frame
    # Of 400, 500 or 600 px high and 4/3 of that wide: 384 px is 0.64 to 0.96 of the height, 0.48 to 0.72 of the width.
    assert side[:, 1].min() == pytest.approx(384 / 600, abs=0.01) and side[:, 1].max() == pytest.approx(1, abs=0.01)
    assert side[:, 0].min() == pytest.approx(384 / 800, abs=0.01) and side[:, 0].max() == pytest.approx(1, abs=0.01)
    means = [np.mean([(min(600.0, s * f / 480) + 384) / 2 / (s * f / 480) for s in (400, 500, 600)]) for f in frame]
    assert side.mean(0) == pytest.approx(means, abs=0.01)


def test_a_crop_by_size_keeps_every_box_with_a_pixel_left(rng):
    config = replace(STILL, crop=1.0, crop_kind="size", min_visible=0.0)
    pixels, whole = torch.zeros(3, 480, 640, dtype=torch.uint8), np.array([[0.0, 0, 640, 480]])
    source = SourceImage(pixels, whole, np.array([1]), 480, 640)
    for _ in range(20):
        example = augment(source, InputContract(64, 64), config, rng)
        assert example.boxes.tolist() == [[0, 0, 64, 64]]  # it fills whatever is seen
