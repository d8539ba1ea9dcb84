"""The report on a data set: counts against numbers known from the source, and every planted defect found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from edgedetr.data.check import check
from edgedetr.errors import DataError


def put_split(
    root, split: str, pixels: dict[str, np.ndarray], *, classes=("cat", "dog"), box=(2, 2, 10, 10), label=1
) -> None:
    """One object on every image of a COCO split."""
    (root / "images" / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for name, image in pixels.items():
        Image.fromarray(image).save(root / "images" / split / f"{name}.png")
    (root / "annotations" / f"{split}.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": f"{name}.png", "width": 200, "height": 150} for i, name in enumerate(pixels)
                ],
                "annotations": [
                    {"id": i, "image_id": i, "category_id": label, "bbox": box} for i in range(len(pixels))
                ],
                "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
            }
        )
    )


def random_pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (150, 200, 3), dtype=np.uint8)


def kinds(report) -> list[str]:
    return sorted(issue.kind for issue in report.issues)


def test_the_counts_of_bccd_are_its_readme_s(shared_data):
    report = check(shared_data / "bccd-mini-voc")
    by_name = {split.name: split for split in report.splits}
    assert {name: (split.images, split.objects) for name, split in by_name.items()} == {
        "train": (12, 178),
        "val": (5, 60),
        "test": (3, 37),
        "trainval": (17, 238),
    }
    assert report.layout == "voc"
    assert [issue.kind for issue in report.issues if issue.fatal] == ["degenerate-box"] * 2
    assert report.fatal == 2
    assert "duplicate-across-splits" not in kinds(report)
    assert any("left out 1 degenerate-box" in line or "degenerate-box" in line for line in report.lines())


def test_box_sizes_follow_coco_s_borders(tmp_path):
    for split, side in (("train", 31.9), ("val", 32), ("test", 96)):
        put_split(tmp_path, split, {split: random_pixels(len(split) + int(side))}, box=[0, 0, side, side])
    found = [(split.small, split.medium, split.large) for split in check(tmp_path).splits]
    assert found == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


def test_duplicates_are_found_within_and_across_splits(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1), "b": random_pixels(2), "c": random_pixels(1)})
    put_split(tmp_path, "test", {"d": random_pixels(2), "e": random_pixels(3)})
    report = check(tmp_path)
    found = {issue.kind: issue for issue in report.issues}
    assert found["duplicate-image"].where.endswith("c.png")
    assert found["duplicate-across-splits"].where.endswith("d.png")
    assert report.fatal == 0


def test_an_image_that_only_fails_when_decoded_is_found(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1), "b": random_pixels(2)})
    file = tmp_path / "images" / "train" / "b.png"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255  # inside the pixel data: its checksum no longer fits
    file.write_bytes(content)
    seen = []
    report = check(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [issue.kind for issue in report.issues if issue.fatal] == ["unreadable-image"]
    assert (report.splits[0].listed, report.splits[0].images, report.splits[0].objects) == (2, 1, 1)
    assert seen[-1] == (2, 2)


def test_classes_that_differ_between_splits_are_found(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1)})
    put_split(tmp_path, "test", {"b": random_pixels(2)}, classes=("dog", "cat"))
    assert "classes-differ" in kinds(check(tmp_path))


def test_imbalance_and_absent_classes_are_notes(tmp_path):
    put_split(tmp_path, "train", {str(i): random_pixels(i) for i in range(11)})
    tables = json.loads((tmp_path / "annotations" / "train.json").read_text())
    assert "class-without-objects" in kinds(check(tmp_path))
    tables["annotations"].append({"id": 99, "image_id": 0, "category_id": 2, "bbox": [1, 1, 5, 5]})
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(tables))
    report = check(tmp_path)
    assert kinds(report) == ["imbalance"]
    assert report.splits[0].per_class == {"cat": 11, "dog": 1}


def test_objects_that_are_not_learned_are_counted_in_the_text(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1), "b": random_pixels(2)})
    tables = json.loads((tmp_path / "annotations" / "train.json").read_text())
    assert not any("neither learned" in line for line in check(tmp_path).lines())
    tables["annotations"][0]["iscrowd"] = 1
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(tables))
    assert "  1 of these objects are crowds or `difficult`: neither learned nor judged" in check(tmp_path).lines()


def test_twelve_bits_in_a_sixteen_bit_file_are_a_finding(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1), "b": random_pixels(2)})
    values = np.random.default_rng(3).integers(0, 4096, random_pixels(1).shape[:2]).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "images" / "train" / "a.png")
    (note,) = (issue for issue in check(tmp_path).issues if issue.kind == "dark-image")
    assert "1 images have no pixel of 64 or more" in note.what and "a.png" in note.what and not note.fatal


def test_a_split_without_usable_images_is_one_finding(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1)})
    put_split(tmp_path, "test", {"b": random_pixels(2)})
    (tmp_path / "images" / "test" / "b.png").unlink()
    report = check(tmp_path)
    assert [split.name for split in report.splits] == ["train"]
    assert "unusable-split" in kinds(report)


def test_the_report_is_plain_json_and_text(tmp_path):
    put_split(tmp_path, "train", {"a": random_pixels(1)})
    report = check(tmp_path)
    again = json.loads(json.dumps(report.to_json()))
    assert again["splits"][0]["images"] == 1
    assert again["left_out"] == 0
    assert all(isinstance(line, str) and "\n" not in line for line in report.lines())


def test_what_is_no_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        check(tmp_path / "nowhere")
