"""A data.yaml stands for the folder that it is in, wherever a data set is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgedetr.api import default_bundle
from edgedetr.cli import app
from edgedetr.data import layouts
from edgedetr.errors import DataError


@pytest.fixture
def cells(tmp_path) -> Path:
    """A YOLO set of one image in each split."""
    root = tmp_path / "cells"
    for split in ("train", "val", "test"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32), split and (9, 9, 9)).save(root / "images" / split / f"{split}.png")
        (root / "labels" / split / f"{split}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (root / "data.yaml").write_text(
        "train: images/train\nval: images/val\ntest: images/test\nnames: [cell]\n", encoding="utf-8"
    )
    return root


def test_a_data_yaml_is_read_as_its_folder(cells, capsys):
    whole, by_file = (layouts.load(path, "train") for path in (cells, cells / "data.yaml"))
    assert whole.root == by_file.root and [s.path for s in whole.samples] == [s.path for s in by_file.samples]
    assert layouts.splits(cells / "data.yaml") == {"train": 1, "val": 1, "test": 1}
    assert default_bundle(cells / "data.yaml") == default_bundle(cells) == Path("runs/cells.bundle")
    assert app.run(["data", "check", str(cells / "data.yaml")]) == 0
    assert "cell" in capsys.readouterr().err


def test_another_name_is_fine_where_it_is_the_only_one(cells):
    (cells / "data.yaml").rename(cells / "cells.yml")
    assert layouts.folder_of(cells / "cells.yml") == cells


def test_a_file_that_the_folder_is_not_read_by_is_refused(cells, capsys):
    (cells / "other.yaml").write_text((cells / "data.yaml").read_text(), encoding="utf-8")
    with pytest.raises(DataError, match=r"other.yaml: the folder .*cells is read by its data.yaml; expected one file"):
        layouts.folder_of(cells / "other.yaml")
    assert app.run(["train", "--data", str(cells / "other.yaml")]) == 1
    assert "call it data.yaml" in capsys.readouterr().err


def test_a_coco_file_is_refused_with_its_folder(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text('{"images": [], "annotations": []}')
    assert app.run(["train", "--data", str(tmp_path / "annotations" / "train.json")]) == 1
    assert f"name the folder of the data set: {tmp_path}" in capsys.readouterr().err
