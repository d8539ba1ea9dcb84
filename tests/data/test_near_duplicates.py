"""Near-copies are found through compression and resizing; different images of one microscope are not."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr.data import near_duplicates


@pytest.fixture(scope="module")
def cells(shared_data) -> list[Path]:
    return sorted((shared_data / "bccd" / "images" / "test").iterdir())[:24]


def changed(source: Path, kind: str, target: Path) -> Path:
    with Image.open(source) as image:
        width, height = image.size
        if kind == "again":
            image.save(target, "JPEG", quality=40)
        elif kind == "smaller":
            image.resize((width * 2 // 3, height * 2 // 3), Image.Resampling.BILINEAR).save(target, "JPEG", quality=60)
        elif kind == "square":
            image.resize((640, 640), Image.Resampling.NEAREST).save(target, "JPEG", quality=90)
        else:
            image.point(lambda value: min(255, int(value * 1.1 + 5))).save(target, "PNG")
    return target


@pytest.mark.parametrize("kind", ["again", "smaller", "square", "brighter"])
def test_copies_saved_again_are_found_and_no_other_image_is(cells, tmp_path, kind):
    copies = [changed(path, kind, tmp_path / f"{number}.img") for number, path in enumerate(cells[:4])]
    found = near_duplicates.near_copies(cells, copies)
    assert {pair.second: pair.first for pair in found} == dict(zip(copies, cells))


def test_different_images_of_one_microscope_are_far_apart(cells):
    hashes = np.array([near_duplicates.fingerprint(np.asarray(Image.open(path).convert("RGB"))) for path in cells])
    distances = (hashes[:, None] != hashes[None]).sum(axis=-1)[np.triu_indices(len(cells), 1)]
    assert distances.min() > 1.5 * near_duplicates.LIMIT
    assert near_duplicates.near_copies(cells[:12], cells[12:]) == []


def test_one_scene_taken_twice_is_a_near_copy(shared_data):
    images = shared_data / "bccd" / "images"
    (pair,) = near_duplicates.near_copies(
        [images / "train" / "BloodImage_00038.jpg"], [images / "val" / "BloodImage_00037.jpg"]
    )
    assert pair.distance <= near_duplicates.LIMIT  # these are two exposures of one field: a copy across the splits


def test_the_product_counts_differing_bits(rng):
    first, second = (rng.integers(0, 2, (n, near_duplicates.BITS)).astype(bool) for n in (5, 7))
    found = near_duplicates.nearest(list(first), list(second), limit=near_duplicates.BITS)
    for there, here, distance in found:
        every = (first != second[here]).sum(axis=1)
        assert distance == every.min() == every[there]
    assert len(found) == 7
    assert near_duplicates.nearest([], list(second)) == near_duplicates.nearest([None], list(second)) == []


def test_images_without_contrast_and_damaged_files_have_no_hash(tmp_path):
    for name, level in (("black.png", 0), ("gray.png", 3)):
        Image.new("RGB", (40, 30), (level,) * 3).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = sorted(tmp_path.iterdir())
    assert near_duplicates.near_copies(paths, paths) == []


def test_a_hash_takes_a_few_milliseconds_at_most(rng):
    pixels = rng.integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    begun = time.perf_counter()
    for _ in range(5):
        near_duplicates.fingerprint(pixels)
    assert (time.perf_counter() - begun) / 5 < 0.02  # about 2 ms; tenfold for a busy machine
