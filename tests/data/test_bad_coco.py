"""Damaged and hostile COCO sets: each defect is named, counted and left out, or stops with one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr.data import layouts
from edgedetr.errors import DataError


@pytest.fixture
def coco(tmp_path) -> Path:
    """Two good images, `a` and `b`, with one object each."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / "train" / f"{name}.jpg")
    write(tmp_path, tables())
    return tmp_path


def tables() -> dict:
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 5, 10, 12], "iscrowd": 0} for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


def write(root: Path, content: object) -> None:
    (root / "annotations" / "train.json").write_text(json.dumps(content))


def spoil_annotation(**changes: object):
    def spoil(content: dict) -> None:
        content["annotations"][1].update(changes)

    return spoil


def spoil_image(**changes: object):
    def spoil(content: dict) -> None:
        content["images"][1].update(changes)

    return spoil


FATAL = [
    ("unknown-class", spoil_annotation(category_id=5)),
    ("unknown-class", spoil_annotation(category_id=None)),
    ("unknown-class", spoil_annotation(category_id=[1])),
    ("unknown-image", spoil_annotation(image_id=77)),
    ("unknown-image", spoil_annotation(image_id=[2])),
    ("bad-box", spoil_annotation(bbox=[1, 2, 3])),
    ("bad-box", spoil_annotation(bbox=None)),
    ("bad-box", spoil_annotation(bbox=["4", "5", "6", "seven"])),
    ("bad-box", spoil_annotation(bbox=[4, float("nan"), 10, 12])),
    ("bad-box", spoil_annotation(bbox=[4, 5, float("inf"), 12])),
    ("bad-box", spoil_annotation(bbox=[True, 5, 6, 7])),
    ("bad-box", spoil_annotation(bbox=[10**400, 5, 6, 7])),
    ("degenerate-box", spoil_annotation(bbox=[4, 5, 0, 12])),
    ("degenerate-box", spoil_annotation(bbox=[4, 5, -3, 12])),
    ("box-outside", spoil_annotation(bbox=[50, 5, 10, 12])),
    ("box-outside", spoil_annotation(bbox=[4, -20, 10, 12])),
    ("missing-image", spoil_image(file_name="c.jpg")),
    ("path-outside", spoil_image(file_name="../../../secret.jpg")),
    ("path-outside", spoil_image(file_name="/etc/passwd")),
    ("path-outside", spoil_image(file_name="C:\\images\\a.jpg")),
    ("bad-image-entry", spoil_image(file_name=3)),
    ("bad-image-entry", spoil_image(id=[2])),
    ("size-mismatch", spoil_image(width=80, height=60)),
    ("size-mismatch", spoil_image(width=30, height=40)),
]


@pytest.mark.parametrize("kind, spoil", FATAL, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(FATAL)])
def test_an_unusable_item_is_named_and_left_out_and_strict_fails(coco, kind, spoil, caplog):
    content = tables()
    spoil(content)
    write(coco, content)
    found = layouts.load(coco, "train")
    assert kind in [issue.kind for issue in found.issues if issue.fatal]
    assert kind in caplog.text
    good = next(sample for sample in found.samples if sample.image_id == 1)
    assert good.boxes.tolist() == [[4, 5, 14, 17]]
    with pytest.raises(DataError, match=kind):
        layouts.load(coco, "train", strict=True)


NOTED = [
    ("box-cut", spoil_annotation(bbox=[30, 20, 20, 20]), [30, 20, 40, 30]),
    ("no-size", spoil_image(width=None), [4, 5, 14, 17]),
    ("no-size", spoil_image(height=0), [4, 5, 14, 17]),
    ("size-mismatch", spoil_image(height=31), [4, 5, 14, 17]),
]


@pytest.mark.parametrize("kind, spoil, box", NOTED, ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(NOTED)])
def test_an_unusual_item_is_noted_and_kept_even_when_strict(coco, kind, spoil, box):
    content = tables()
    spoil(content)
    write(coco, content)
    found = layouts.load(coco, "train", strict=True)
    assert [issue.kind for issue in found.issues] == [kind]
    assert found.samples[1].boxes.tolist() == [box]


def test_rounding_at_the_border_is_cut_without_a_word(coco):
    content = tables()
    content["annotations"][1]["bbox"] = [-0.3, 0, 40.6, 30.2]
    write(coco, content)
    found = layouts.load(coco, "train", strict=True)
    assert found.issues == ()
    assert found.samples[1].boxes.tolist() == [[0, 0, 40, 30]]


def test_a_truncated_image_is_left_out(coco):
    file = coco / "images" / "train" / "b.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-400])
    found = layouts.load(coco, "train")
    assert [sample.image_id for sample in found.samples] == [1]
    assert [issue.kind for issue in found.issues] == ["unreadable-image"]


BROKEN_FILES = {
    "empty": (b"", "empty"),
    "cut": (b'{"images": [{"id": 1', "not readable as JSON"),
    "list": (b"[]", "expected an object with the lists"),
    "binary": (bytes(range(256)), "not UTF-8 text"),
    "deep": (b"[" * 200_000, "nested too deep"),
    "no annotations": (b'{"images": [], "categories": []}', "expected an object with the lists"),
    "wrong type": (b'{"images": 3, "annotations": [], "categories": []}', "expected an object with the lists"),
    "no classes": (b'{"images": [], "annotations": [], "categories": []}', "category ids"),
    "twice": (
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
        "each once",
    ),
    "class id": (b'{"images": [], "annotations": [], "categories": [{"id": 1.5, "name": "a"}]}', "whole number"),
    "no images": (b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no usable image"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_annotation_file_stops_with_its_name(coco, name):
    content, message = BROKEN_FILES[name]
    (coco / "annotations" / "train.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        layouts.load(coco, "train")
    assert str(coco) in str(error.value)


def test_a_set_in_which_nothing_is_usable_says_what_was_wrong(coco):
    for file in (coco / "images" / "train").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no usable image \(2 listed, 2 missing-image\)"):
        layouts.load(coco, "train")


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "no such directory"),
        ("empty", "empty directory"),
        ("file", "a file; expected"),
        ("images only", "no annotations of a known layout"),
    ],
)
def test_what_is_no_set_says_what_one_looks_like(tmp_path, what, message):
    path = tmp_path / what
    if what == "file":
        path.write_text("x")
    elif what != "missing":
        path.mkdir()
    if what == "images only":
        Image.new("RGB", (4, 4)).save(path / "a.jpg")
    for read in (lambda: layouts.load(path, "train"), lambda: layouts.splits(path)):
        with pytest.raises(DataError, match=message):
            read()
