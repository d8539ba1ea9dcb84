"""The rendered set: same seed, same bytes; boxes fit what is drawn; never half a set on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgedetr.data import layouts, synthetic
from edgedetr.errors import DataError

SMALL = {"train": 6, "val": 2, "verify": 3, "size": 96}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, second, other = (
        contents(synthetic.render(tmp_path / name, seed=seed, **SMALL)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second
    assert sum(first[name] == other[name] for name in first if name.endswith(".jpg")) == 0


def test_the_set_reads_strictly_and_says_that_it_is_synthetic(tmp_path):
    root = synthetic.render(tmp_path / "set", **SMALL)
    assert layouts.splits(root) == {"train": 6, "val": 2, "test": 3}
    for split in layouts.splits(root):
        found = layouts.load(root, split, strict=True)
        assert found.issues == ()
        assert [info.name for info in found.classes] == list(synthetic.SHAPES)
    assert json.loads((root / "params.json").read_text())["synthetic"] is True
    assert json.loads((root / "annotations" / "test.json").read_text())["info"]["synthetic"] is True


def test_no_two_images_are_the_same(tmp_path):
    files = [
        data for name, data in contents(synthetic.render(tmp_path / "set", **SMALL)).items() if name.endswith(".jpg")
    ]
    assert len(set(files)) == 11


@pytest.mark.parametrize("shape", synthetic.ALL_SHAPES)
def test_the_box_is_the_tight_extent_of_what_is_painted(shape, rng):
    size = 120
    whole = 0
    for _ in range(40):
        window, mask, box = synthetic._shape(rng, shape, size)
        if min(box) == 0 or max(box) == size:  # the border cuts it, perhaps through the corner that another side is at
            continue
        whole += 1
        painted = np.zeros((size, size))
        painted[window] = mask
        y, x = np.nonzero(painted > 0)
        tight = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        # Masks are drawn on half pixels and Pillow fills every pixel that an outline touches: up to one pixel more a
        # side, and a sharp tip may cover too little of its last pixel to leave a trace.
        np.testing.assert_allclose(box, tight, atol=2.0)
        side = max(box[2] - box[0], box[3] - box[1])
        assert 0.05 * size < side <= 0.5 * size + 1
    assert whole > 10


def test_objects_that_are_mostly_covered_are_not_annotated(monkeypatch):
    whole = ((slice(10, 50), slice(10, 50)), np.ones((40, 40), np.float32), (10.0, 10.0, 50.0, 50.0))

    def covered(fraction: float) -> int:
        cut = round(40 * fraction)
        top = ((slice(10, 50), slice(10, 10 + cut)), np.ones((40, cut), np.float32), (10.0, 10.0, 10.0 + cut, 50.0))
        shapes = iter([whole, top])
        monkeypatch.setattr(synthetic, "_shape", lambda *_: next(shapes))
        seed = next(s for s in range(100) if _count(s) == 2)
        return len(synthetic.draw(np.random.default_rng(seed), ("circle",), 64).boxes)

    def _count(seed: int) -> int:
        state = np.random.default_rng(seed)
        synthetic._background(state, 64)
        for _ in range(state.integers(2, 6)):
            synthetic._draw_distractor(state, np.zeros((64, 64, 3), np.float32), 64)
        return int(state.integers(1, 6))

    assert covered(0.5) == 2
    assert covered(0.65) == 2
    assert covered(0.8) == 1


def test_images_hold_one_to_five_objects_of_every_class():
    drawn = [synthetic.draw(np.random.default_rng([5, i]), synthetic.SHAPES, 96) for i in range(120)]
    assert {len(scene.labels) for scene in drawn} == {1, 2, 3, 4, 5}
    fraction = np.bincount(np.concatenate([scene.labels for scene in drawn])) / sum(
        len(scene.labels) for scene in drawn
    )
    # 330 objects of 6 classes: 1/6 each, standard deviation 0.02.
    assert np.abs(fraction - 1 / 6).max() < 0.08


def test_twenty_shapes_can_be_drawn_in_other_sizes_and_numbers():
    assert len(set(synthetic.ALL_SHAPES)) == 20 and synthetic.ALL_SHAPES[:6] == synthetic.SHAPES
    drawn = [
        synthetic.draw(np.random.default_rng([5, i]), synthetic.ALL_SHAPES, 200, 16, (0.05, 0.1)) for i in range(60)
    ]
    assert max(len(scene.labels) for scene in drawn) > 12
    sides = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(1) for scene in drawn])
    assert sides.max() <= 21 and np.percentile(sides, 5) > 5  # diameters of 10 to 20 px; the border cuts some


@pytest.mark.parametrize("wrong", [{"objects": 0}, {"sides": (0.5, 0.2)}, {"sides": (0.1, 1.5)}])
def test_impossible_numbers_and_sizes_are_refused(tmp_path, wrong):
    with pytest.raises(DataError, match="at least one object, and two ascending fractions"):
        synthetic.render(tmp_path / "set", **SMALL, **wrong)


def test_a_finished_set_is_not_drawn_again_and_changed_parameters_are(tmp_path):
    root = synthetic.render(tmp_path / "set", **SMALL)
    marked = root / "images" / "train" / "000001.jpg"
    marked.write_bytes(b"marked")
    synthetic.render(root, **SMALL)
    assert marked.read_bytes() == b"marked"
    synthetic.render(root, seed=9, **SMALL)
    assert marked.read_bytes() != b"marked"


def test_an_interrupted_rendering_leaves_nothing_behind(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.render(tmp_path / "set", progress=stop, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("dear")
    with pytest.raises(DataError, match="contains something else"):
        synthetic.render(tmp_path / "photos", **SMALL)
    assert (tmp_path / "photos" / "holiday.txt").read_text() == "dear"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": 0}, "at least one image"),
        ({"size": 8}, "32 to 2048"),
        ({"classes": ("circel",)}, "did you mean 'circle'"),
        ({"classes": ()}, "at least one"),
        ({"classes": ("star", "star")}, "each once"),
    ],
)
def test_unusable_parameters_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        synthetic.render(tmp_path / "set", **{**SMALL, **changes})
    assert not (tmp_path / "set").exists()
