"""What a set's folder holds and no split does, and writings of other tools that were read as something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from data.sets import coco, put_image, tables, text, voc, xml, yolo

from edgedetr.data import images, layouts
from edgedetr.data.check import check
from edgedetr.errors import DataError, UsageError
from edgedetr.runtime.predict import frames, predict

LINE = "0 0.5 0.5 0.25 0.2\n"


def found(root, kind):
    return [
        (Path(one.where).relative_to(root).as_posix(), one.objects, one.fatal)
        for one in check(root).issues
        if one.kind == kind
    ]


def test_images_outside_the_splits_are_named_with_their_objects(tmp_path):
    yolo(tmp_path)
    put_image(tmp_path / "images" / "loose.jpg", 7)
    text(tmp_path / "labels" / "loose.txt", LINE * 3)
    put_image(tmp_path / "images" / "test" / "t.jpg", 8)
    assert found(tmp_path, "unlisted-image") == [("images", 3, False), ("images/test", 0, False)]


def test_labels_of_a_split_whose_images_are_gone_are_counted_in_objects(tmp_path):
    yolo(tmp_path)
    text(tmp_path / "labels" / "test" / "t.txt", LINE * 3)
    assert found(tmp_path, "label-without-image") == [("labels/test", 3, True)]
    assert check(tmp_path).objects_left_out == 3


def test_label_files_next_to_the_folder_where_they_belong_are_counted(tmp_path):
    yolo(tmp_path, labels="labels")
    assert found(tmp_path, "label-without-image") == [("labels", 2, True)]
    (said,) = (one.what for one in check(tmp_path).issues if one.kind == "no-labels")
    assert str(tmp_path / "labels" / "train") in said


@pytest.mark.parametrize("images, labels", [("images/train", "label/train"), ("train/img", "train/labels")])
def test_labels_in_a_folder_of_another_name_are_counted(tmp_path, images, labels):
    yolo(tmp_path, f"names: [cat, dog]\ntrain: {images}\n", images=images, labels=labels)
    assert found(tmp_path, "label-without-image") == [(labels, 2, True)]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_a_locked_folder_that_is_no_split_stops_nothing(tmp_path):
    coco(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "locked").mkdir(mode=0)
    assert [one.kind for one in check(tmp_path).issues] == ["unreadable-folder"]


def test_what_a_disk_keeps_for_itself_is_no_folder_of_the_set(tmp_path):
    coco(tmp_path)
    put_image(tmp_path / "lost+found" / "a.jpg", 5)
    assert check(tmp_path).issues == ()


def test_names_that_differ_in_case_and_have_a_label_file_each_are_not_shared(tmp_path):
    yolo(tmp_path, names=("a", "A"))
    if len(os.listdir(tmp_path / "images" / "train")) == 2:  # a disk that knows case
        assert found(tmp_path, "same-name") == []


def test_an_image_instead_of_a_list_of_images_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.jpg' is not a folder or list"):
        layouts.load(yolo(tmp_path, "names: [cat, dog]\ntrain: images/train/a.jpg\n"), "train")


def test_images_that_cvat_s_only_file_does_not_list_are_named(tmp_path):
    text(tmp_path / "annotations" / "instances_default.json", json.dumps(tables()))
    for number in range(4):
        put_image(tmp_path / "images" / f"{number}.jpg", number)
    assert found(tmp_path, "unlisted-image") == [("images", 0, False)]


def test_files_in_a_split_under_a_link_are_not_reported_as_left_over(tmp_path):
    yolo(tmp_path / "set", images="raw/images", labels="raw/labels")
    (tmp_path / "set" / "images").mkdir()
    (tmp_path / "set" / "images" / "train").symlink_to("../raw/images")
    (tmp_path / "set" / "labels").mkdir()
    (tmp_path / "set" / "labels" / "train").symlink_to("../raw/labels")
    assert {one.kind for one in check(tmp_path / "set").issues} == {"class-without-objects"}


@pytest.mark.parametrize("name, target", [("c.jpg", "/nowhere/c.jpg"), ("camera", "/nowhere"), ("me.jpg", "me.jpg")])
def test_links_to_nothing_are_named_and_not_passed_over(tmp_path, caplog, name, target):
    yolo(tmp_path)
    os.symlink(target, tmp_path / "images" / "train" / name)
    assert found(tmp_path, "broken-link") == [(f"images/train/{name}", 0, True)]
    with pytest.raises(DataError, match="broken-link"):
        layouts.load(tmp_path, "train", strict=True)
    assert len(list(frames([tmp_path / "images"]))) == 2
    assert name in caplog.text and "1 of 3 files could not be read" in caplog.text


def test_an_empty_text_is_not_the_whole_folder():
    with pytest.raises(UsageError, match="empty text"):
        list(frames([""]))


def test_a_file_as_the_folder_of_results_is_an_error_at_once(tmp_path):
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        list(predict(None, [tmp_path], out=put_image(tmp_path / "a.jpg")))


def test_folders_of_annotations_are_splits(tmp_path):
    for seed, split in enumerate(("train", "val")):
        put_image(tmp_path / "images" / split / "0.jpg", seed)
        text(tmp_path / "annotations" / split / "0.xml", xml("0.jpg"))
    assert layouts.splits(tmp_path) == {"train": 1, "val": 1}
    (sample,) = layouts.load(tmp_path, "val").samples
    assert sample.path == tmp_path / "images" / "val" / "0.jpg"
    assert check(tmp_path).issues == ()


def test_annotations_next_to_a_folder_of_val_are_train(tmp_path):
    voc(tmp_path)
    put_image(tmp_path / "JPEGImages" / "val" / "c.jpg", 4)
    text(tmp_path / "Annotations" / "val" / "c.xml", xml("c.jpg"))
    assert layouts.splits(tmp_path) == {"train": 2, "val": 1}


def test_an_image_of_the_same_sub_folder_is_the_one_that_an_xml_is_about(tmp_path):
    for seed, folder in enumerate("ab"):
        put_image(tmp_path / "JPEGImages" / folder / "0.jpg", seed)
        text(tmp_path / "Annotations" / folder / "0.xml", xml("0.jpg"))
    loaded = layouts.load(tmp_path, "train")
    assert [sample.path.parent.name for sample in loaded.samples] == ["a", "b"] and loaded.issues == ()


def test_lists_of_other_names_are_said_to_be_unused(tmp_path):
    voc(tmp_path)
    text(tmp_path / "ImageSets" / "Main" / "mine_a.txt", "a\n")
    assert [where for where, _, _ in found(tmp_path, "unused-list")] == ["ImageSets/Main"]


@pytest.mark.parametrize(
    "file, line",
    [
        ("ImageSets/{}.txt", "{}"),
        ("{}.txt", "{}"),
        ("{}_list.txt", "JPEGImages/{}.jpg Annotations/{}.xml"),
        ("{}.txt", "./JPEGImages/{}.jpg\t./Annotations/{}.xml"),
        ("{}.txt", "/home/me/VOCdevkit/VOC2007/JPEGImages/{}.jpg"),
    ],
)
def test_lists_of_splits_elsewhere_than_in_main_keep_the_splits_apart(tmp_path, file, line):
    voc(tmp_path, ("a b", "c"))
    text(tmp_path / file.format("train"), line.replace("{}", "a b") + "\n")
    text(tmp_path / "labels.txt", "dog\n")
    text(tmp_path / file.format("valid"), line.replace("{}", "c") + "\n")
    assert layouts.splits(tmp_path) == {"train": 1, "val": 1}
    assert [sample.path.name for sample in layouts.load(tmp_path, "val").samples] == ["c.jpg"]
    assert [sample.path.name for sample in layouts.load(tmp_path, "train").samples] == ["a b.jpg"]


@pytest.mark.parametrize("root, said", [("html", "<html>"), ("annotations", "CVAT")])
def test_xml_of_something_else_is_no_image_without_objects(tmp_path, root, said):
    voc(tmp_path)
    text(tmp_path / "Annotations" / "a.xml", f"<{root}><object/></{root}>")
    (fatal,) = (one for one in layouts.load(tmp_path, "train").issues if one.fatal)
    assert fatal.kind == "unreadable-annotation" and said in fatal.what


def test_numbers_of_coco_may_be_quoted(tmp_path):
    content = tables()
    content["annotations"][0].update(bbox=["4", "5.0", "1e1", " 12 "], area="100")
    content["images"][0].update(width="40", height="30")
    content["images"][1].update(width="80", height="60")
    loaded = layouts.load(coco(tmp_path, content=content), "train")
    assert loaded.samples[0].boxes[0].tolist() == [4, 5, 14, 17] and loaded.samples[0].areas[0] == 100
    assert [(one.kind, one.objects) for one in loaded.issues] == [("size-mismatch", 2)]


def test_boxes_of_two_corners_are_named_and_left_out(tmp_path):
    content = tables(3)
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]
    loaded = layouts.load(coco(tmp_path, content=content, count=3), "train")
    assert [(one.kind, one.objects) for one in loaded.issues] == [("box-in-corners", 2)] * 3
    content["annotations"][0]["bbox"] = [20, 6, 8, 9]  # one box that has no area as corners
    assert "box-in-corners" not in [
        one.kind for one in layouts.load(coco(tmp_path / "b", content=content, count=3), "train").issues
    ]


@pytest.mark.parametrize("nothing", ["", "null", "~", "None", "[]"])
def test_a_split_of_no_value_is_no_split(tmp_path, nothing):
    yolo(tmp_path, f"names: [cat, dog]\ntrain: images/train\ntest: {nothing}\n")
    assert list(layouts.splits(tmp_path)) == ["train"] and layouts.load(tmp_path, "train").issues == ()


def test_roboflow_s_test_split_that_was_not_exported_stops_no_other(tmp_path):
    yolo(
        tmp_path,
        "names: [cat, dog]\ntrain: ../train/images\ntest: ../test/images\n",
        images="train/images",
        labels="train/labels",
    )
    assert list(layouts.splits(tmp_path)) == ["train"]
    assert found(tmp_path, "missing-split") == [("data.yaml", 0, True)]


@pytest.mark.parametrize("written", ["test/images", "../test/images", "../../zoo/valid/images", "data/Test2017/images"])
def test_a_split_that_is_not_there_is_never_the_folder_of_all_images(tmp_path, written):
    yolo(tmp_path, f"names: [cat, dog]\ntrain: images/train\ntest: {written}\n")
    assert list(layouts.splits(tmp_path)) == ["train"]
    assert len(found(tmp_path, "missing-split")) == 1


def test_two_descriptions_are_named(tmp_path):
    yolo(tmp_path).joinpath("data.yaml").rename(tmp_path / "a.yaml")
    text(tmp_path / "b.yaml", (tmp_path / "a.yaml").read_text())
    with pytest.raises(DataError, match=r"a\.yaml, b\.yaml each describe"):
        layouts.load(tmp_path, "train")


def test_a_class_without_a_name_is_a_finding(tmp_path):
    yolo(tmp_path, "names: [cat, '']\ntrain: images/train\n")
    assert [one.kind for one in check(tmp_path).issues].count("empty-class-name") == 1


def test_fiftyone_s_folder_of_each_split_is_found(tmp_path):
    for seed, split in enumerate(("train", "validation")):
        text(tmp_path / split / "labels.json", json.dumps(tables(1)))
        put_image(tmp_path / split / "data" / "0.jpg", seed)
    assert layouts.splits(tmp_path) == {"train": 1, "val": 1}
    assert layouts.load(tmp_path, "val").samples[0].path == tmp_path / "validation" / "data" / "0.jpg"
    assert check(tmp_path).issues == ()


def test_what_is_missing_for_a_layout_is_said(tmp_path):
    put_image(tmp_path / "a" / "0.jpg")
    text(tmp_path / "a" / "0.txt", LINE)
    with pytest.raises(DataError, match=r"put classes\.txt next to them"):
        layouts.detect(tmp_path / "a")
    for name in ("x.json", "y.json"):
        text(tmp_path / "b" / name, json.dumps(tables(1)))
    with pytest.raises(DataError, match=r"x\.json, y\.json are COCO files"):
        layouts.detect(tmp_path / "b")


def test_label_studio_s_own_folders_are_left_off(tmp_path):
    content = tables(1)
    content["images"][0]["file_name"] = "../../label-studio/data/media/upload/3/0.jpg"
    text(tmp_path / "result.json", json.dumps(content))
    put_image(tmp_path / "images" / "0.jpg")
    assert len(layouts.load(tmp_path, "train").samples[0].boxes) == 2


@pytest.mark.parametrize("brand", [b"isom", b"mp42", b"qt  "])
def test_a_video_named_as_an_image_is_not_called_heic(tmp_path, brand):
    with pytest.raises(images.ImageUnreadable, match="this is a video"):
        images.decode(text(tmp_path / "a.jpg", b"\0\0\0\x20ftyp" + brand + bytes(40)))


def test_what_is_no_image_is_said_without_python_s_words(tmp_path):
    with pytest.raises(images.ImageUnreadable) as error:
        images.decode(text(tmp_path / "a.jpg", "<html>404</html>"))
    assert "no known format" in str(error.value) and "BufferedReader" not in str(error.value)
