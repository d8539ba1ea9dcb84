"""The three layouts: one set in three copies gives one form; unusual spellings of each; splits and classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from edgedetr.data import layouts
from edgedetr.data.detection_set import canonical_split_name
from edgedetr.errors import DataError


def put_image(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 30)).save(path)


def put_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def coco_tables(file_name: str = "a.jpg") -> dict:
    return {
        "images": [{"id": 7, "file_name": file_name, "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 9, "bbox": [4, 5, 10, 12], "iscrowd": 0, "area": 60}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.mark.parametrize("split, images, objects", [("train", 12, 178), ("val", 5, 60), ("test", 3, 37)])
def test_three_copies_of_one_set_agree(shared_data, split, images, objects):
    yolo, voc, coco = (layouts.load(shared_data / name, split) for name in ("bccd-mini-yolo", "bccd-mini-voc", "bccd"))
    whole = {sample.path.name: sample for sample in coco.samples}
    assert (
        [info.name for info in coco.classes]
        == [info.name for info in yolo.classes]
        == [info.name for info in voc.classes]
    )
    for copy in (yolo, voc):
        assert len(copy) == images
        assert sum(len(sample.boxes) for sample in copy.samples) == objects
        for sample in copy.samples:
            source = whole[sample.path.name]
            # YOLO's six decimals of 640 pixels: 3e-4 pixels each for center and half size.
            np.testing.assert_allclose(sample.boxes, source.boxes, atol=1e-3)
            np.testing.assert_array_equal(sample.labels, source.labels)
            assert (sample.height, sample.width) == (480, 640)
    degenerate = [issue for issue in voc.issues if issue.kind == "degenerate-box"]
    assert len(degenerate) == {"train": 1, "val": 1, "test": 0}[split]


@pytest.mark.parametrize("name, split", [("bccd", "test"), ("cards", "test")])
def test_coco_reading_equals_pycocotools(shared_data, name, split):
    reference = COCO(str(shared_data / name / "annotations" / f"{split}.json"))
    found = layouts.load(shared_data / name, split)
    assert sorted(sample.image_id for sample in found.samples) == sorted(reference.getImgIds())
    ids = {info.index: info.category_id for info in found.classes}
    for sample in found.samples:
        rows = reference.loadAnns(reference.getAnnIds(sample.image_id))
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)])
        np.testing.assert_array_equal(sample.boxes, boxes)
        assert [ids[label] for label in sample.labels.tolist()] == [row["category_id"] for row in rows]
        np.testing.assert_array_equal(sample.areas, [row["area"] for row in rows])


def test_the_layout_is_recognized(shared_data):
    found = {name: layouts.detect(shared_data / name) for name in ("bccd", "cards", "bccd-mini-yolo", "bccd-mini-voc")}
    assert found == {"bccd": "coco", "cards": "coco", "bccd-mini-yolo": "yolo", "bccd-mini-voc": "voc"}


def test_splits_are_counted_in_the_usual_order(shared_data):
    assert list(layouts.splits(shared_data / "bccd").items()) == [("train", 205), ("val", 87), ("test", 72)]
    assert layouts.splits(shared_data / "cards") == {"train": 296, "test": 67}


def test_an_absent_split_names_those_present(shared_data):
    with pytest.raises(DataError, match=r"no split 'val'.*has test, train"):
        layouts.load(shared_data / "cards", "val")


def test_classes_are_contiguous_and_keep_their_ids(tmp_path):
    put_image(tmp_path / "images" / "train" / "a.jpg")
    put_text(tmp_path / "annotations" / "train.json", json.dumps(coco_tables()))
    found = layouts.load(tmp_path, "train")
    assert [(info.index, info.category_id, info.name) for info in found.classes] == [(0, 3, "cat"), (1, 9, "dog")]
    (sample,) = found.samples
    assert sample.image_id == 7
    assert sample.boxes.tolist() == [[4, 5, 14, 17]]
    assert sample.labels.tolist() == [1]
    assert sample.areas.tolist() == [60]


@pytest.mark.parametrize(
    "image, annotations",
    [
        ("images/train/a.jpg", "annotations/train.json"),
        ("images/a.jpg", "annotations/train.json"),
        ("train2017/a.jpg", "annotations/instances_train2017.json"),
        ("images/train2017/a.jpg", "annotations/instances_train2017.json"),
        ("train/a.jpg", "train/_annotations.coco.json"),
        ("train/a.jpg", "train.json"),
    ],
)
def test_usual_coco_trees_are_found(tmp_path, image, annotations):
    put_image(tmp_path / image)
    put_text(tmp_path / annotations, json.dumps(coco_tables()))
    assert layouts.load(tmp_path, "train").samples[0].path == tmp_path / image


@pytest.mark.parametrize(
    "tree, description",
    [
        ("images/train/a.jpg labels/train/a.txt", "names: [cat, dog]\ntrain: images/train\n"),
        (
            "images/train/a.jpg labels/train/a.txt",
            "path: ../datasets/pets  # the author's\ntrain: images/train\nnames:\n  0: cat\n  1: 'dog'\n",
        ),
        (
            "images/train/a.jpg labels/train/a.txt",
            "train:\n  - images/train\nnc: 2\nnames:\n- cat\n- dog\ndownload: |\n  import x: y\n",
        ),
        ("images/train/a.jpg labels/train/a.txt", 'names: {0: cat,\n        1: "dog"}\ntrain: images/train'),
        ("train/images/a.jpg train/labels/a.txt", "train: ../train/images\nnames: ['cat', 'dog']\n"),
        ("train/images/a.jpg train/labels/a.txt", None),
        ("images/a.jpg labels/a.txt", None),
        ("images/train/a.jpg labels/train/a.txt", "train: train.txt\nnames: [cat, dog]\n"),
    ],
)
def test_usual_yolo_trees_are_found(tmp_path, tree, description):
    image, labels = tree.split()
    put_image(tmp_path / image)
    put_text(tmp_path / labels, "1 0.5 0.5 0.25 0.2\n0 0.1 0.1 0.3 0.1 0.3 0.4\n")
    put_text(tmp_path / "train.txt", "images/train/a.jpg\n\n")
    put_text(tmp_path / ("classes.txt" if description is None else "data.yaml"), description or "cat\ndog\n")
    found = layouts.load(tmp_path, "train", strict=True)
    assert [info.name for info in found.classes] == ["cat", "dog"]
    # By hand, 40 x 30 pixels: center (20, 15), size 10 x 6; the polygon spans 0.1..0.3 of 40 and 0.1..0.4 of 30.
    np.testing.assert_allclose(found.samples[0].boxes, [[15, 12, 25, 18], [4, 3, 12, 12]], rtol=1e-12)
    assert found.samples[0].labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "texts, images, listing",
    [
        ("Annotations", "JPEGImages", True),
        ("Annotations", "JPEGImages", False),
        ("annotations", "images", False),
        ("train", "train", False),
    ],
)
def test_usual_voc_trees_are_found(tmp_path, texts, images, listing):
    put_image(tmp_path / images / "a.png")
    thing = (
        "<object><name>{}</name><difficult>{}</difficult>"
        "<bndbox><xmin>4</xmin><ymin>5</ymin><xmax>14</xmax><ymax>17</ymax></bndbox></object>"
    )
    put_text(tmp_path / texts / "a.xml", f"<annotation>{thing.format('dog', 1)}{thing.format('cat', 0)}</annotation>")
    if listing:
        put_text(tmp_path / "ImageSets" / "Main" / "train.txt", "a\n")
    found = layouts.load(tmp_path, "train", strict=True)
    assert [info.name for info in found.classes] == ["cat", "dog"]
    (sample,) = found.samples
    assert sample.boxes.tolist() == [[4, 5, 14, 17]] * 2
    assert sample.labels.tolist() == [1, 0]
    assert sample.crowd.tolist() == [True, False]


def test_an_image_without_a_label_file_has_no_objects(tmp_path):
    put_image(tmp_path / "images" / "train" / "a.jpg")
    put_text(tmp_path / "labels" / "train" / "b.txt", "")
    put_text(tmp_path / "classes.txt", "cat\n")
    found = layouts.load(tmp_path, "train", strict=True)
    assert found.samples[0].boxes.shape == (0, 4)
    assert [issue.kind for issue in found.issues] == ["no-label-file", "label-without-image"]


def test_two_layouts_at_once_are_not_guessed(tmp_path):
    put_image(tmp_path / "images" / "train" / "a.jpg")
    put_text(tmp_path / "annotations" / "train.json", json.dumps(coco_tables()))
    put_text(tmp_path / "data.yaml", "names: [cat]\ntrain: images/train\n")
    with pytest.raises(DataError, match="has annotations of coco and yolo"):
        layouts.load(tmp_path, "train")
    assert layouts.load(tmp_path, "train", layout="coco").classes[1].name == "dog"


@pytest.mark.parametrize(
    "name, split",
    [
        ("valid", "val"),
        ("Validation", "val"),
        ("train2017", "train"),
        ("test", "test"),
        ("val_2014", "val"),
        ("holdout", "holdout"),
        ("trainval", "trainval"),
    ],
)
def test_usual_names_of_splits(name, split):
    assert canonical_split_name(name) == split
