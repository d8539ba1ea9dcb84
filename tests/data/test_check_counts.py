"""What `data check` reports beyond counts: near-copies, splits that cannot be used, its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from sets import coco, text

from edgedetr.cli import run
from edgedetr.data.check import check


def scene(path: Path, seed: int, quality: int = 95) -> None:
    """A smooth image of 400 x 300 pixels, as a photograph is."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((400, 300), Image.Resampling.BICUBIC).save(path, "JPEG", quality=quality)


def photographs(root: Path, split: str, seeds: dict[int, int]) -> None:
    """One object on each; `seeds` are scene and quality."""
    for number, (seed, quality) in enumerate(seeds.items()):
        scene(root / "images" / split / f"{number}.jpg", seed, quality)
    text(
        root / "annotations" / f"{split}.json",
        json.dumps(
            {
                "images": [{"id": n, "file_name": f"{n}.jpg", "width": 400, "height": 300} for n in range(len(seeds))],
                "annotations": [
                    {"id": n, "image_id": n, "category_id": 1, "bbox": [9, 9, 50, 50]} for n in range(len(seeds))
                ],
                "categories": [{"id": 1, "name": "cat"}],
            }
        ),
    )


def test_an_image_saved_again_in_another_split_is_named_once(tmp_path):
    photographs(tmp_path, "train", {1: 95, 2: 95, 3: 95})
    photographs(tmp_path, "val", {2: 40, 3: 95, 4: 95})
    found = {issue.kind: issue for issue in check(tmp_path).issues}
    assert sorted(found) == ["duplicate-across-splits", "near-copy-across-splits"]
    assert found["near-copy-across-splits"].where.endswith("val/0.jpg")
    assert "train/1.jpg" in found["near-copy-across-splits"].what
    assert not found["near-copy-across-splits"].fatal


def test_a_set_of_which_no_split_can_be_used_ends_with_exit_1(tmp_path, capsys):
    coco(tmp_path)
    assert run(["data", "check", str(tmp_path)]) == 0
    capsys.readouterr()
    for file in (tmp_path / "images" / "train").iterdir():
        file.write_bytes(b"no image")
    assert run(["data", "check", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["splits"] == []


def test_a_split_whose_images_only_fail_when_they_are_decoded_cannot_be_used(tmp_path):
    coco(tmp_path, count=1)
    file = tmp_path / "images" / "train" / "0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, "PNG")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    report = check(tmp_path)
    assert [issue.kind for issue in report.issues] == ["unreadable-image", "unusable-split"]
    assert report.objects_left_out == 2
    assert report.splits == ()


def test_splits_with_classes_in_another_order_are_matched_by_name(tmp_path):
    photographs(tmp_path, "train", {1: 95})
    photographs(tmp_path, "val", {2: 95})
    path = tmp_path / "annotations" / "val.json"
    path.write_text(
        path.read_text()
        .replace('"id": 1, "name": "cat"', '"id": 7, "name": "cat"')
        .replace('"category_id": 1', '"category_id": 7')
    )
    (note,) = check(tmp_path).issues
    assert (note.kind, note.fatal) == ("classes-differ", False)
    assert "matched by name" in note.what


def test_objects_of_a_split_that_cannot_be_used_are_counted(tmp_path):
    coco(tmp_path, count=3)
    coco(tmp_path, split="val", count=2, seed=9)
    for file in (tmp_path / "images" / "val").iterdir():
        file.unlink()
    report = check(tmp_path)
    assert report.objects_left_out == 4
    assert [split.name for split in report.splits] == ["train"]
    assert sorted(issue.kind for issue in report.issues) == ["missing-image"] * 2 + ["unusable-split"]
