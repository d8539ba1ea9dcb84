"""Damaged and hostile YOLO and VOC sets: each defect is named and left out, or stops with one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgedetr.data import layouts, voc
from edgedetr.errors import DataError


@pytest.fixture
def yolo(tmp_path) -> Path:
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "train" / "a.jpg")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\n")
    return tmp_path


@pytest.mark.parametrize(
    "line, kind",
    [
        ("2 0.5 0.5 0.1 0.1", "unknown-class"),
        ("-1 0.5 0.5 0.1 0.1", "unknown-class"),
        ("0.5 0.5 0.5 0.1 0.1", "unknown-class"),
        ("cat 0.5 0.5 0.1 0.1", "bad-box"),
        ("0 0.5 0.5 0.1", "bad-box"),
        ("0 0.5 0.5 0.1 0.1 0.9", "bad-box"),
        ("0 nan 0.5 0.1 0.1", "bad-box"),
        ("0 inf 0.5 0.1 0.1", "bad-box"),
        ("0 20 15 10 6", "bad-box"),
        ("0 0.5 0.5 0 0.1", "degenerate-box"),
        ("0 1.5 0.5 0.1 0.1", "box-outside"),
    ],
)
def test_a_bad_label_line_is_named_and_left_out(yolo, line, kind):
    (yolo / "labels" / "train" / "a.txt").write_text(f"1 0.5 0.5 0.5 0.5\n{line}\n")
    found = layouts.load(yolo, "train")
    assert [issue.kind for issue in found.issues] == [kind]
    assert found.samples[0].boxes.tolist() == [[10, 7.5, 30, 22.5]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("names: [cat\ntrain: images/train\n", "line 2: not YAML"),
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", "without a gap"),
        ("nc: 3\nnames: [cat, dog]\ntrain: images/train\n", "nc is 3"),
        ("names: [cat]\ntrain: ../../elsewhere\n", "not a folder or list inside"),
        ("names: [cat]\ntrain: /tmp\n", "not a folder or list inside"),
        ("names: [cat]\ntrain: images/tran\n", "not a folder or list inside"),
        ("names: [cat]\nnames: [dog]\n", "is repeated"),
        ("train: images/train\n", "no class names"),
        ("%%%\n", "line 1"),
        ("names: [[cat]]\ntrain: images/train\n", "flat list"),
    ],
)
def test_a_bad_data_yaml_stops_with_its_name_and_line(yolo, text, message):
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        layouts.load(yolo, "train")


def test_binary_labels_and_yaml_are_named(yolo):
    (yolo / "labels" / "train" / "a.txt").write_bytes(b"0 0.5 0.5 0.1 \x81")
    assert [issue.kind for issue in layouts.load(yolo, "train").issues] == ["unreadable-annotation"]
    (yolo / "data.yaml").write_bytes(b"names: [\x81]")
    with pytest.raises(DataError, match=r"data\.yaml: not UTF-8"):
        layouts.load(yolo, "train")


def test_a_listed_path_that_leaves_the_set_is_refused(yolo):
    (yolo / "train.txt").write_text("images/train/a.jpg\n../../other.jpg\n/etc/hosts.jpg\n")
    (yolo / "data.yaml").write_text("names: [cat]\ntrain: train.txt\n")
    found = layouts.load(yolo, "train")
    assert len(found) == 1
    assert [issue.kind for issue in found.issues] == ["path-outside", "path-outside", "no-label-file"]


BOMB = (
    '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;&x;">]><annotation><object><name>&y;</name></object></annotation>'
)


@pytest.mark.parametrize(
    "content, message",
    [
        (BOMB.encode(), "document type"),
        (BOMB.encode("utf-16"), "document type"),
        (b"<annotation><object>", "not complete XML"),
        (b"", "not complete XML"),
        (b"\x00\x01", "not complete XML"),
        (b'<?xml version="1.0" encoding="klingon"?><a/>', "not complete XML"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "document type"),
    ],
)
def test_xml_bombs_and_damaged_xml_are_refused(tmp_path, content, message):
    file = tmp_path / "a.xml"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        voc.parse(file)


def test_voc_defects_are_named_and_left_out(tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    box = "<bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>14</xmax><ymax>17</ymax></bndbox>"
    things = [
        ("cat", box.format(4)),
        ("cot", box.format(4)),
        ("cat", box.format("?")),
        ("cat", ""),
        ("cat", box.format(14)),
    ]
    text = "".join(f"<object><name>{name}</name>{corners}</object>" for name, corners in things)
    for name in "ab":
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{text}</annotation>")
    (tmp_path / "Annotations" / "b.xml").write_text(BOMB)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    found = layouts.load(tmp_path, "train")
    assert sorted(issue.kind for issue in found.issues) == sorted(
        ["unknown-class", "bad-box", "bad-box", "degenerate-box", "unreadable-annotation", "missing-annotation"]
    )
    assert "did you mean 'cat'" in next(issue.what for issue in found.issues if issue.kind == "unknown-class")
    assert found.samples[0].boxes.tolist() == [[4, 5, 14, 17]]
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("../../../etc/passwd\n")
    with pytest.raises(DataError, match="is a path"):
        layouts.load(tmp_path, "train")
