"""A training on a set with ids beyond 64 bits, classes in another order in val, and an empty parent class."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import micro
import pytest

from edgedetr.bundle import Bundle
from edgedetr.data.detection_set import DataConfig
from edgedetr.errors import DataError
from edgedetr.training.data.dataset import open_splits
from edgedetr.training.train import train


def rewrite(root: Path, split: str, change) -> None:
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def huge(content: dict) -> None:
    for row in content["images"]:
        row["id"] += 20240131123045000100
    for row in content["annotations"]:
        row["image_id"] += 20240131123045000100


def turned(content: dict) -> None:
    """The two classes under each other's id, and a parent that has no object."""
    content["categories"] = [{"id": 3, "name": "small"}, {"id": 4, "name": "large"}, {"id": 0, "name": "squares"}]
    for row in content["annotations"]:
        row["category_id"] = 7 - row["category_id"]


def parent(content: dict) -> None:
    content["categories"].append({"id": 0, "name": "squares", "supercategory": "none"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Bundle:
    root = tmp_path_factory.mktemp("plain")
    return train(micro.recipe(epochs=1), micro.write_data(root / "data", 4, 2), root / "plain.bundle")


def scores(bundle: Bundle) -> list[dict]:
    lines = (bundle.path / "train" / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k in ("epoch", "ap", "ap50", "ar100")}
        for line in lines
        if '"eval"' in line
    ]


def test_the_same_set_in_an_unusual_form_trains_to_the_same_weights(plain, tmp_path):
    root = micro.write_data(tmp_path / "data", 4, 2)
    for split in ("train", "val", "test"):
        rewrite(root, split, huge)
    rewrite(root, "train", parent)
    rewrite(root, "val", turned)
    recipe = micro.recipe(epochs=1)
    recipe = replace(recipe, data=replace(recipe.data, drop_empty_classes=True))
    unusual = train(recipe, root, tmp_path / "unusual.bundle")
    assert unusual.manifest.classes == plain.manifest.classes
    assert unusual.manifest.files["weights.safetensors"].sha256 == plain.manifest.files["weights.safetensors"].sha256
    assert scores(unusual) == scores(plain) != []


def test_a_class_with_objects_in_val_alone_is_refused_before_the_first_epoch(tmp_path):
    root = micro.write_data(tmp_path / "data", 4, 2)
    rewrite(root, "val", lambda content: content["categories"][0].update(name="huge"))
    with pytest.raises(DataError, match=r"\[val\]: has objects of the class 'huge', which in train is not among"):
        train(micro.recipe(epochs=1), root, tmp_path / "unusual.bundle")
    assert not (tmp_path / "unusual.bundle").exists()


def test_images_of_val_that_are_trained_on_are_said(tmp_path, caplog):
    root = micro.write_data(tmp_path / "data", 4, 2)
    open_splits(root, DataConfig(select_split="train"))
    assert "4 of 4 images of train are training images too" in caplog.text
    caplog.clear()
    open_splits(root, DataConfig())
    assert "training images too" not in caplog.text
