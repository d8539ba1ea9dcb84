"""Data sets as other people's tools and systems write them: COCO ids and boxes, VOC names, encodings, Macs, Windows."""

from __future__ import annotations

import copy
import json
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parent))

from sets import coco, put_image, tables, text, voc, xml, yolo

from edgedetr.data import coco_boxes, layouts
from edgedetr.data.check import check
from edgedetr.data.detection_set import DetectionSet, display_names
from edgedetr.errors import DataError


def kinds(found: DetectionSet) -> list[str]:
    return [issue.kind for issue in found.issues]


def load(root: Path, split: str = "train") -> DetectionSet:
    return layouts.load(root, split)


# ids


def with_ids(change) -> dict:
    """Tables in which every image id went through `change`."""
    content = tables()
    for row in content["images"]:
        row["id"] = change(row["id"])
    for row in content["annotations"]:
        row["image_id"] = change(row["image_id"])
    return content


@pytest.mark.parametrize(
    "change, kept",
    [(str, [0, 1]), (float, [0, 1]), (lambda n: -n - 5, [-5, -6]), (lambda n: 2**63 - 1 - n, [2**63 - 1, 2**63 - 2])],
)
def test_ids_that_are_whole_numbers_in_any_writing_stay(tmp_path, change, kept):
    found = load(coco(tmp_path, content=with_ids(change)))
    assert kinds(found) == []
    assert [sample.image_id for sample in found.samples] == kept
    assert [sample.original_id for sample in found.samples] == [None, None]
    assert [len(sample.boxes) for sample in found.samples] == [2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"frame_{n}",
        lambda n: 20240131123045000101 + n,
        lambda n: 2**63 - 1 + n,
        lambda n: f"00{n}",
        lambda n: 10**400 + n,
    ],
)
def test_other_ids_are_renumbered_inside_and_kept_as_original(tmp_path, change):
    found = load(coco(tmp_path, content=with_ids(change)))
    assert kinds(found) == []
    assert [sample.image_id for sample in found.samples] == [1, 2]
    assert [sample.original_id for sample in found.samples] == [change(0), change(1)]
    assert [len(sample.boxes) for sample in found.samples] == [2, 2]


def test_an_annotation_may_write_an_id_otherwise_than_the_image_does(tmp_path):
    content = tables()
    for row in content["annotations"]:
        row["image_id"], row["category_id"] = str(row["image_id"]), float(row["category_id"])
    assert [sample.labels.tolist() for sample in load(coco(tmp_path, content=content)).samples] == [[0, 1]] * 2


@pytest.mark.parametrize(
    "ids, kept", [(("1", "2"), [1, 2]), ((2**70, 2**70 + 1), [1, 2]), (("cat", "dog"), [1, 2]), ((90.0, 7), [7, 90])]
)
def test_class_ids_in_any_writing_are_taken(tmp_path, ids, kept):
    content = tables()
    for row in content["categories"]:
        row["id"] = ids[row["id"] - 1]
    for row in content["annotations"]:
        row["category_id"] = ids[row["category_id"] - 1]
    found = load(coco(tmp_path, content=content))
    assert sorted(info.category_id for info in found.classes) == kept
    assert [found.classes[label].name for label in found.samples[0].labels] == ["cat", "dog"]


def test_every_image_of_a_shared_id_is_left_out_by_name(tmp_path):
    content = tables(3)
    content["images"][2]["id"] = 1
    found = load(coco(tmp_path, content=content, count=3))
    assert [sample.path.name for sample in found.samples] == ["0.jpg"]
    left = [issue for issue in found.issues if issue.kind == "duplicate-image-id"]
    assert sorted(issue.where for issue in left) == ["1.jpg", "2.jpg"]
    assert all(issue.fatal for issue in left)
    # The two objects of id 1 belong to one or the other; those of id 2 are of an image that is not there.
    assert sum(issue.objects for issue in found.issues) == 2 + 2


def test_one_image_listed_twice_alike_is_one_image(tmp_path):
    content = tables()
    content["images"].append(copy.copy(content["images"][0]))
    found = load(coco(tmp_path, content=content))
    assert kinds(found) == []
    assert len(found) == 2


def test_one_file_under_two_ids_is_noted(tmp_path):
    content = tables()
    content["images"][1]["file_name"] = "0.jpg"
    assert "image-listed-twice" in kinds(load(coco(tmp_path, content=content)))


# classes


def test_classes_of_equal_names_are_kept_apart_by_id(tmp_path):
    content = tables(
        categories=[
            {"id": 1, "name": "helmet"},
            {"id": 2, "name": "vest"},
            {"id": 3, "name": "helmet", "supercategory": "none"},
        ]
    )
    report = check(coco(tmp_path, content=content))
    assert report.splits[0].per_class == {"helmet (id 1)": 2, "vest": 2, "helmet (id 3)": 0}
    found = {issue.kind: issue.what for issue in report.issues}
    assert "1, 3" in found["equal-class-names"]
    assert "id 3" in found["empty-parent-class"] and "drop_empty_classes" in found["empty-parent-class"]


def test_roboflow_s_parent_class_is_named(tmp_path):
    content = tables(
        categories=[
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
            {"id": 2, "name": "dog", "supercategory": "pets"},
        ]
    )
    parents = [issue for issue in load(coco(tmp_path, content=content)).issues if issue.kind == "empty-parent-class"]
    assert len(parents) == 1 and "'pets' (id 0)" in parents[0].what


def test_equal_names_in_data_yaml_are_two_classes(tmp_path):
    found = load(yolo(tmp_path, "names: [cat, cat]\ntrain: images/train\n"))
    assert display_names(found.classes) == ["cat (id 0)", "cat (id 1)"]
    assert kinds(found) == ["equal-class-names"]


# boxes

POLYGON = [[4, 5, 14, 5, 14, 17, 4, 17]]


@pytest.mark.parametrize("segmentation", [POLYGON, POLYGON[0], [[[4, 5], [14, 5], [14, 17]]], POLYGON + [[6, 6, 8, 9]]])
@pytest.mark.parametrize("bbox", [None, [], [0, 0, 0, 0], "4 5 10 12"])
def test_an_object_without_bbox_gets_the_box_of_its_polygon(tmp_path, segmentation, bbox):
    content = tables()
    content["annotations"][0].update(bbox=bbox, segmentation=segmentation)
    found = load(coco(tmp_path, content=content))
    assert found.samples[0].boxes[0].tolist() == [4, 5, 14, 17]
    assert kinds(found) == ["box-from-segmentation"]


@pytest.mark.parametrize("compressed", [True, False])
def test_the_box_of_a_mask_is_pycocotools(compressed, rng):
    for _ in range(60):
        pixels = np.zeros((int(rng.integers(1, 50)), int(rng.integers(1, 50))), np.uint8)
        for _ in range(int(rng.integers(1, 4))):
            y, x = int(rng.integers(pixels.shape[0])), int(rng.integers(pixels.shape[1]))
            pixels[y : y + int(rng.integers(1, 40)), x : x + int(rng.integers(1, 40))] = 1
        encoded = coco_mask.encode(np.asfortranarray(pixels))
        x, y, w, h = coco_mask.toBbox(encoded).tolist()
        if compressed:
            segmentation = {"size": list(pixels.shape), "counts": encoded["counts"].decode()}
        else:
            flat = np.concatenate([[0], pixels.ravel(order="F"), [2]])
            ends = np.flatnonzero(np.diff(flat.astype(int)) != 0)
            counts = np.diff(np.concatenate([[0], ends])).tolist()
            segmentation = {"size": list(pixels.shape), "counts": counts if flat[1] == 0 else [0, *counts[1:]]}
        assert coco_boxes.segmentation_box(segmentation) == (x, y, x + w, y + h)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[]],
        [[1, 2]],
        [[1, 2, 3]],
        ["abc"],
        {"size": [3, 3]},
        {"size": [3, 3], "counts": "\x01"},
        {"counts": [1]},
        {"size": [3, 3], "counts": [1, 1e300]},
        {"size": [3, 3], "counts": [-1, 2]},
        {"size": "33", "counts": [0, 9]},
        {"size": [3, 3], "counts": [0, 10]},
        {"size": [3, 3], "counts": [9]},
        {"size": [3, 3], "counts": "o" * 99},
        7,
    ],
)
def test_what_is_no_segmentation_has_no_box(segmentation):
    assert coco_boxes.segmentation_box(segmentation) is None


def test_equal_boxes_are_found_and_one_is_kept(tmp_path):
    content = tables()
    content["annotations"] += [dict(content["annotations"][0], id=90 + n) for n in range(3)]
    content["annotations"].append(dict(content["annotations"][0], id=99, category_id=2))  # another class
    found = load(coco(tmp_path, content=content))
    assert len(found.samples[0].boxes) == 3
    (note,) = found.issues
    assert (note.kind, note.objects, note.fatal) == ("duplicate-box", 3, False)


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_a_box_that_cvat_turned_becomes_the_box_around_it(tmp_path, layout):
    if layout == "coco":
        content = tables(1)
        content["annotations"][0].update(attributes={"occluded": False, "rotation": 90.0})
        content["annotations"][1].update(attributes={"occluded": False, "rotation": 0.0})
        coco(tmp_path, content=content, count=1)
    else:
        said = "<attributes><attribute><name>rotation</name><value>450</value></attribute></attributes>"
        voc(tmp_path, ("a",))
        text(tmp_path / "Annotations" / "a.xml", xml("a.jpg").replace("</bndbox>", f"</bndbox>{said}"))
    found = load(tmp_path)
    assert found.samples[0].boxes[0].tolist() == pytest.approx([3, 6, 15, 16])  # 10 x 12 about (9, 11), a quarter turn
    assert kinds(found) == ["turned-box"]


def test_class_names_that_differ_in_case_or_spaces_alone_are_a_finding(tmp_path):
    voc(tmp_path)
    text(tmp_path / "Annotations" / "a.xml", xml("a.jpg", "Dog"))
    (note,) = load(tmp_path).issues
    assert note.kind == "similar-class-names" and "'Dog' and 'dog'" in note.what and not note.fatal


def test_boxes_in_fractions_are_named_left_out_and_refused_by_strict(tmp_path):
    content = tables()
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x / 40, y / 30, w / 40, h / 30]
    coco(tmp_path, content=content)
    report = check(tmp_path)
    assert [issue.kind for issue in report.issues if issue.fatal] == ["box-in-fractions"] * 2
    assert report.objects_left_out == 4
    with pytest.raises(DataError, match="box-in-fractions"):
        layouts.load(tmp_path, "train", strict=True)


def test_a_box_below_a_pixel_among_others_is_a_note(tmp_path):
    content = tables()
    content["annotations"][0]["bbox"] = [4, 5, 0.4, 12]
    found = load(coco(tmp_path, content=content))
    assert kinds(found) == ["box-below-a-pixel"]
    assert len(found.samples[0].boxes) == 2


# names of files


@pytest.mark.parametrize("on_disk, in_file", [("NFD", "NFC"), ("NFC", "NFD")])
def test_the_other_unicode_form_of_a_name_is_found(tmp_path, on_disk, in_file):
    name = "Müller é ガ.jpg"
    content = tables(1)
    content["images"][0]["file_name"] = unicodedata.normalize(in_file, name)
    text(tmp_path / "coco" / "annotations" / "train.json", json.dumps(content))
    put_image(tmp_path / "coco" / "images" / "train" / unicodedata.normalize(on_disk, name))
    assert len(load(tmp_path / "coco").samples[0].boxes) == 2
    there = unicodedata.normalize(on_disk, "é")
    yolo(tmp_path / "yolo", names=())
    put_image(tmp_path / "yolo" / "images" / "train" / f"{there}.jpg")
    text(tmp_path / "yolo" / "labels" / "train" / f"{unicodedata.normalize(in_file, 'é')}.txt", "0 0.5 0.5 0.5 0.5")
    assert len(load(tmp_path / "yolo").samples[0].boxes) == 1
    voc(tmp_path / "voc", ())
    put_image(tmp_path / "voc" / "JPEGImages" / f"{there}.jpg")
    text(tmp_path / "voc" / "Annotations" / "x.xml", xml(unicodedata.normalize(in_file, "é.jpg")))
    assert len(load(tmp_path / "voc").samples[0].boxes) == 1


@pytest.mark.parametrize(
    "written",
    [
        "0.JPG",
        "train\\0.jpg",
        "images/train/0.jpg",
        "data/obj/0.jpg",
        "./0.jpg",
        "../train/0.jpg",
        "{root}/images/train/0.jpg",
        "/home/me/{name}/images/train/0.jpg",
        "C:\\Users\\me\\{name}\\images\\train\\0.jpg",
        "../../../{name}/images/train/0.jpg",
    ],
)
def test_a_file_name_of_another_machine_is_found_in_this_folder(tmp_path, written):
    root = coco(tmp_path / "pets")
    content = tables()
    content["images"][0]["file_name"] = written.format(root=root, name=root.name)
    text(root / "annotations" / "train.json", json.dumps(content))
    assert load(root).samples[0].path == root / "images" / "train" / "0.jpg"


@pytest.mark.parametrize(
    "written", ["../../../secret.jpg", "/etc/hosts", "/images/train/0.jpg", "D:\\0.jpg", "a\0.jpg", " "]
)
def test_a_file_name_outside_of_the_folder_is_not_opened(tmp_path, written):
    put_image(tmp_path / "secret.jpg")
    content = tables()
    content["images"][0]["file_name"] = written
    root = coco(tmp_path / "pets", content=content)
    found = load(root)
    assert [issue.kind for issue in found.issues if issue.fatal] == ["path-outside"]
    assert [issue.objects for issue in found.issues if issue.fatal] == [2]


def test_names_too_long_for_a_disk_are_missing_images(tmp_path):
    content = tables()
    content["images"][0]["file_name"] = "n" * 300 + ".jpg"
    assert "missing-image" in kinds(load(coco(tmp_path, content=content)))


def test_hidden_annotation_files_and_folders_are_ignored(tmp_path):
    coco(tmp_path)
    text(tmp_path / "annotations" / "._train.json", b"\0\5\x16\7Mac OS X")
    text(tmp_path / "._train.json", b"\0")
    text(tmp_path / "__MACOSX" / "_annotations.coco.json", b"\0")
    assert kinds(load(tmp_path)) == []
    yolo(tmp_path / "y")
    text(tmp_path / "y" / "._data.yaml", b"\0")
    text(tmp_path / "y" / "labels" / "train" / "._a.txt", b"\0")
    assert kinds(load(tmp_path / "y")) == []
    voc(tmp_path / "v")
    text(tmp_path / "v" / "Annotations" / "._a.xml", b"\0")
    text(tmp_path / "v" / ".ipynb_checkpoints" / "a.xml", xml())
    assert kinds(load(tmp_path / "v")) == []
    assert list(layouts.splits(tmp_path / "v")) == ["train"]


@pytest.mark.parametrize(
    "file, images",
    [
        ("result.json", "images"),
        ("labels.json", "data"),
        ("annotations.json", "JPEGImages"),
        ("_annotations.coco.json", "."),
    ],
)
def test_one_annotation_file_in_the_root_is_the_train_split(tmp_path, file, images):
    text(tmp_path / file, json.dumps(tables()))
    text(tmp_path / "notes.json", "{}")
    for number in range(2):
        put_image(tmp_path / images / f"{number}.jpg", number)
    assert [len(sample.boxes) for sample in load(tmp_path).samples] == [2, 2]


def test_images_that_the_annotations_do_not_list_are_counted(tmp_path):
    coco(tmp_path, count=2)
    put_image(tmp_path / "images" / "train" / "extra.jpg", 9)
    (note,) = load(tmp_path).issues
    assert note.kind == "unlisted-image" and "1 images" in note.what and "extra.jpg" in note.what


# VOC


def test_the_filename_in_an_xml_decides(tmp_path):
    put_image(tmp_path / "JPEGImages" / "IMG_7.png")
    put_image(tmp_path / "JPEGImages" / "IMG_7.jpg", 1)
    for name, said in (("000000", "IMG_7.png"), ("000001", "C:\\photos\\img_7.JPG"), ("000002", "")):
        text(tmp_path / "Annotations" / f"{name}.xml", xml(said))
    put_image(tmp_path / "JPEGImages" / "000002.jfif", 2)
    found = load(tmp_path)
    assert [sample.path.name for sample in found.samples] == ["IMG_7.png", "IMG_7.jpg", "000002.jfif"]
    assert kinds(found) == []


def test_two_images_of_one_name_without_a_filename_are_named(tmp_path):
    voc(tmp_path, ("a",))
    put_image(tmp_path / "JPEGImages" / "a.png", 3)
    text(tmp_path / "Annotations" / "a.xml", xml())
    assert "same-name" in kinds(load(tmp_path))
    text(tmp_path / "Annotations" / "a.xml", xml("a.png"))
    assert load(tmp_path).samples[0].path.name == "a.png"


def test_a_template_s_filename_in_every_xml_gives_way_to_the_file_s_own_name(tmp_path):
    voc(tmp_path, ("a", "b"))
    for name in "ab":
        text(tmp_path / "Annotations" / f"{name}.xml", xml("a.jpg"))
    found = load(tmp_path)
    assert [sample.path.name for sample in found.samples] == ["a.jpg", "b.jpg"]
    assert kinds(found) == ["filename-repeated"]


@pytest.mark.parametrize(
    "line",
    [
        "my photo (1)",
        "my photo (1).jpg",
        "my photo (1).xml",
        "my photo (1)  1",
        "MY PHOTO (1)",
        "JPEGImages/my photo (1).jpg",
        "\ufeffmy photo (1)",
    ],
)
def test_a_line_of_a_list_is_one_name(tmp_path, line):
    found = load(voc(tmp_path, ("my photo (1)", "other"), listing=f"{line}\r\n\r\n"))
    assert [sample.path.name for sample in found.samples] == ["my photo (1).jpg"]


def test_images_without_an_xml_file_are_counted(tmp_path):
    voc(tmp_path)
    put_image(tmp_path / "JPEGImages" / "c.jpg", 5)
    (note,) = load(tmp_path).issues
    assert note.kind == "unlisted-image" and "c.jpg" in note.what


@pytest.mark.parametrize("texts, images", [("labels", "data"), ("xmls", "images"), ("Annotations", "imgs"), (".", ".")])
def test_xml_files_of_other_writers_are_found(tmp_path, texts, images):
    put_image(tmp_path / images / "a.jpg")
    text(tmp_path / texts / "a.xml", xml("a.jpg"))
    assert [len(sample.boxes) for sample in load(tmp_path).samples] == [1]


def test_keypoint_files_are_read_where_there_are_no_instances(tmp_path):
    for number in range(2):
        put_image(tmp_path / "train2017" / f"{number}.jpg", number)
    text(tmp_path / "annotations" / "person_keypoints_train2017.json", json.dumps(tables()))
    found = load(tmp_path)
    assert [len(sample.boxes) for sample in found.samples] == [2, 2] and kinds(found) == []
    text(tmp_path / "annotations" / "instances_train2017.json", json.dumps(tables(1)))
    assert len(load(tmp_path)) == 1


def test_cvat_s_only_split_is_the_train_split(tmp_path):
    text(tmp_path / "annotations" / "instances_default.json", json.dumps(tables()))
    for number in range(2):
        put_image(tmp_path / "images" / "default" / f"{number}.jpg", number)
    assert list(layouts.splits(tmp_path)) == ["train"]
    assert kinds(load(tmp_path)) == []


def test_an_archive_of_windows_without_folders_is_named(tmp_path):
    put_image(tmp_path / "images\\train\\a.jpg")
    with pytest.raises(DataError, match="archive made on Windows"):
        load(tmp_path)


# encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_text_with_a_mark_is_read_everywhere(tmp_path, encoding):
    yolo(tmp_path / "y", "names: [Käfig, dog]\ntrain: images/train\n".encode(encoding), line="")
    text(tmp_path / "y" / "labels" / "train" / "a.txt", "0 0.5 0.5 0.5 0.5\r\n".encode(encoding))
    found = load(tmp_path / "y")
    assert (found.classes[0].name, len(found.samples[0].boxes)) == ("Käfig", 1)
    voc(tmp_path / "v", listing="a\n".encode(encoding))
    text(tmp_path / "v" / "classes.txt", "dog\n".encode(encoding))
    text(tmp_path / "v" / "Annotations" / "a.xml", xml("a.jpg").encode(encoding))
    assert len(load(tmp_path / "v").samples[0].boxes) == 1
    text(coco(tmp_path / "c") / "annotations" / "train.json", json.dumps(tables()).encode(encoding))
    assert len(load(tmp_path / "c").samples[0].boxes) == 2


def test_text_of_another_encoding_is_one_error_with_file_and_advice(tmp_path):
    root = yolo(tmp_path / "y", "names: [Käfig]\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"data\.yaml: not UTF-8 text.*save it as UTF-8"):
        load(root)
    root = yolo(tmp_path / "z", "train: images/train\n")
    text(root / "classes.txt", "木材\n".encode("gbk"))
    with pytest.raises(DataError, match=r"classes\.txt: not UTF-8 text.*save it as UTF-8"):
        load(root)
    root = voc(tmp_path / "v", listing="Höhle\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.txt: not UTF-8 text.*save it as UTF-8"):
        load(root)


@pytest.mark.parametrize("encoding", ["GBK", "Shift_JIS", "windows-1251", "ISO-8859-1", "UTF-16"])
def test_xml_in_the_encoding_that_it_declares_is_read(tmp_path, encoding):
    name = {"GBK": "狗", "Shift_JIS": "犬", "windows-1251": "пёс"}.get(encoding, "Köter")
    content = f'<?xml version="1.0" encoding="{encoding}"?>' + xml("a.jpg", name)
    text(voc(tmp_path, ("a",)) / "Annotations" / "a.xml", content.encode(encoding))
    assert [info.name for info in load(tmp_path).classes] == [name]


@pytest.mark.parametrize(
    "declared", ["", *(f'<?xml version="1.0" encoding="{name}"?>' for name in ("utf-8", "idna", "unicode_escape"))]
)
def test_xml_in_another_encoding_than_it_says_is_named_first(tmp_path, declared):
    voc(tmp_path, ("a", "b"))
    for name in "ab":
        text(tmp_path / "Annotations" / f"{name}.xml", declared.encode() + xml("a.jpg", "狗").encode("gbk"))
    with pytest.raises(DataError, match=r"a\.xml: not complete XML.*save it as UTF-8.*2 XML files"):
        load(tmp_path)


# what is not a plain file


def test_pipes_named_like_annotations_never_block(tmp_path):
    root = yolo(tmp_path / "y")
    (root / "data.yaml").unlink()
    os.mkfifo(root / "data.yaml")
    os.mkfifo(root / "classes.txt")
    os.mkfifo(root / "images" / "train" / "c.jpg")
    with pytest.raises(DataError, match="no class names"):
        load(root)
    root = voc(tmp_path / "v")
    os.mkfifo(root / "Annotations" / "c.xml")
    os.mkfifo(root / "classes.txt")
    assert len(load(root)) == 2
    root = coco(tmp_path / "c")
    (root / "annotations" / "train.json").unlink()
    os.mkfifo(root / "annotations" / "train.json")
    with pytest.raises(DataError, match="no annotations of a known layout"):
        load(root)
