"""YOLO sets as people have them: any YAML, labels without images, poses, other cases and folders, Darknet, LabelImg."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sets import put_image, text, yolo

from edgedetr.data import data_yaml, layouts
from edgedetr.data.check import check
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import DataError, MissingDependency


def load(root: Path, split: str = "train") -> DetectionSet:
    return layouts.load(root, split)


def kinds(found: DetectionSet) -> list[str]:
    return [issue.kind for issue in found.issues]


@pytest.mark.parametrize(
    "yaml",
    [
        "\r\n    train: images/train\r\n    nc: 2\r\n    names: [cat, dog]\r\n    ",
        "{train: images/train, names: [cat, dog]}",
        '{"train": "images/train", "names": ["cat", "dog"]}',
        "train: images/train\nnames:\n  - cat\n  - dog\ndownload: |\n  import os: x\n    y\n",
        "train: >-\n  images/train\nnames: {0: 'cat', 1: \"dog\"}",
        "--- !!map\ntrain: !!str images/train\nnames: &n [cat, dog]\ncopy: *n\n...\n",
        "names: [cat, # first\n  dog]\ntrain: [images/train]  # one\n",
        "? train\n: images/train\n? names\n: - cat\n  - dog\n",
        "train: images/train\nnames:\n  1: dog\n  0: cat\nkpt_shape:\n",
    ],
)
def test_any_yaml_is_read(tmp_path, yaml):
    found = load(yolo(tmp_path, yaml))
    assert [info.name for info in found.classes] == ["cat", "dog"]
    assert len(found) == 2


def test_names_stay_text_whatever_yaml_makes_of_them(tmp_path):
    names = ["yes", "no", "on", "1e3", "0o7", "null", "~", "2024-01-01", "3"]
    found = load(yolo(tmp_path, f"names: [{', '.join(names)}]\ntrain: images/train\n"))
    assert [info.name for info in found.classes] == names


def test_an_alias_bomb_is_neither_expanded_nor_followed(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    root = yolo(tmp_path, "\n".join([*lines, "names: *a29", "train: images/train"]))
    begun = time.process_time()
    with pytest.raises(DataError, match="repeats a list of lists"):
        load(root)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "yaml, said",
    [
        ("train: images/train\n\tnames: [cat]\n", "line 2: not YAML"),
        ("names: !!python/object/apply:os.system [touch x]\ntrain: *none\n", "there is no anchor &none|not YAML"),
        ("- cat\n- dog\n", "line 1: holds"),
        ("names: " + "[" * 100, "line 1: nested more than 20 deep"),
        ("names: " + "[" * 200_000, "nested more than 20 deep|not YAML"),
        ("names: [cat]\nnames: [dog]\n", "'names' is repeated"),
        ("[a, b]: c\n", "a list or mapping as a key"),
        ("names: [cat]\n" + " " * 40_000 + "x", "not YAML|no class|no folder"),
        ("names: [\x01cat]", "not YAML"),
        ("names: [\0cat]", "zero bytes"),
        ("x" * (1 << 20) + "x", "expected at most 1 MiB"),
        ("nc: " + "1" * 5000 + "\nnames: [cat]\ntrain: " + "n" * 5000, "not a folder or list"),
        ("nc: ²\nnames: [cat]\ntrain: images/train\nkpt_shape: [²³, 3]", "kpt_shape"),
        ("names: [cat]\ntrain: {a: b}\nval: [[images]]", "not a folder or list"),
    ],
)
def test_bad_yaml_is_one_error_at_once(tmp_path, yaml, said):
    root = yolo(tmp_path, yaml)
    begun = time.process_time()
    with pytest.raises(DataError, match=said):
        load(root)
    assert time.process_time() - begun < 1


def test_an_empty_yaml_is_no_description(tmp_path):
    with pytest.raises(DataError, match="line 1"):
        data_yaml.read(text(tmp_path / "data.yaml", ""))


@pytest.mark.parametrize(
    "train",
    [
        "{root}/images/train",
        "../{name}/images/train",
        "images\\train",
        "./images/train/",
        "../images/train",
        "/content/{name}/images/train",
        "images/../images/train",
        "IMAGES/Train",
        "{root}/train.txt",
        "train.txt",
    ],
)
def test_paths_into_this_folder_are_found(tmp_path, train):
    root = tmp_path / "own"
    yolo(root, f"names: [cat, dog]\ntrain: {train.format(root=root, name='own')}\n")
    text(root / "train.txt", f"{root}/images/train/a.jpg\n../own/images/train/b.jpg\n")
    assert [sample.path for sample in load(root).samples] == [root / "images" / "train" / f"{n}.jpg" for n in "ab"]


@pytest.mark.parametrize("path", ["{root}", ".", "../own", "/content/own", "/nowhere/else", "C:\\data\\own", "own", ""])
def test_path_counts_where_it_is_this_folder_and_does_no_harm_elsewhere(tmp_path, path):
    root = tmp_path / "own"
    yolo(root, f"path: {path.format(root=root)}\nnames: [cat, dog]\ntrain: images/train\n")
    assert len(load(root)) == 2


@pytest.mark.parametrize(
    "line, path",
    [
        ("my photo.jpg", "my photo.jpg"),
        ("images\\train\\a.jpg", "images/train/a.jpg"),
        ("./a.jpg", "lists/a.jpg"),
        ("data/obj_train_data/c.png", "obj_train_data/c.png"),
        ("images/train/A.JPG", "images/train/a.jpg"),
    ],
)
def test_lines_of_a_list_are_names_of_images(tmp_path, line, path):
    yolo(tmp_path, "names: [cat, dog]\ntrain: lists/train.txt\n", names=("a",))
    put_image(tmp_path / path)
    text(tmp_path / "lists" / "train.txt", line + "\n")
    assert [sample.path for sample in load(tmp_path).samples] == [tmp_path / path]


@pytest.mark.parametrize(
    "images, labels",
    [("Images/train", "Labels/train"), ("IMAGES/train", "labels/Train"), ("train/Images", "train/Labels")],
)
def test_images_and_labels_are_found_whatever_the_case(tmp_path, images, labels):
    yolo(tmp_path, f"names: [cat, dog]\ntrain: {images}\n", images=images, labels=labels)
    assert [len(sample.boxes) for sample in load(tmp_path).samples] == [1, 1]
    (tmp_path / "data.yaml").unlink()
    text(tmp_path / "classes.txt", "cat\ndog\n")
    assert [len(sample.boxes) for sample in load(tmp_path).samples] == [1, 1]


def test_label_files_without_an_image_are_findings_with_their_objects(tmp_path):
    yolo(tmp_path)
    text(tmp_path / "labels" / "train" / "gone.txt", "0 0.5 0.5 0.1 0.1\n" * 3)
    text(tmp_path / "labels" / "train" / "empty.txt", "")
    text(tmp_path / "labels" / "train" / "classes.txt", "cat\ndog\n")
    (tmp_path / "images" / "train" / "b.jpg").unlink()
    report = check(tmp_path)
    found = {Path(f.where).name: (f.objects, f.fatal) for f in report.issues if f.kind == "label-without-image"}
    assert found == {"gone.txt": (3, True), "b.txt": (1, True), "empty.txt": (0, False)}
    assert report.objects_left_out == 4
    assert any("4 objects" in line for line in report.lines())
    with pytest.raises(DataError, match="label-without-image"):
        layouts.load(tmp_path, "train", strict=True)


def test_labels_of_images_that_a_list_leaves_out_are_no_orphans(tmp_path):
    yolo(tmp_path, "names: [cat, dog]\ntrain: train.txt\n")
    text(tmp_path / "train.txt", "images/train/a.jpg\n")
    text(tmp_path / "labels" / "train" / "gone.txt", "0 0.5 0.5 0.1 0.1\n")
    orphans = [issue.where for issue in load(tmp_path).issues if issue.kind == "label-without-image"]
    assert [Path(where).name for where in orphans] == ["gone.txt"]


def test_objects_of_unreadable_images_and_labels_are_counted(tmp_path):
    yolo(tmp_path, names=("a", "b", "c"), line="0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.1 0.1\n")
    text(tmp_path / "images" / "train" / "a.jpg", b"no image")
    text(tmp_path / "labels" / "train" / "b.txt", "9 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n")
    report = check(tmp_path)
    assert {f.kind: f.objects for f in report.issues if f.fatal} == {"unreadable-image": 2, "unknown-class": 1}
    assert report.to_json()["objects_left_out"] == 3


def test_two_images_of_one_name_share_a_label_file_and_are_named(tmp_path):
    put_image(yolo(tmp_path) / "images" / "train" / "a.png", 7)
    assert kinds(load(tmp_path)) == ["same-name"]


@pytest.mark.parametrize("shape, points", [("[12, 2]", 24), ("[17, 3]", 51), ("[1, 2]", 2)])
def test_boxes_of_poses_are_read_where_data_yaml_says_so(tmp_path, shape, points):
    line = "1 0.5 0.5 0.25 0.2 " + " ".join(["0.9"] * points) + "\n"
    root = yolo(tmp_path, f"names: [cat, dog]\ntrain: images/train\nkpt_shape: {shape}\n", line=line)
    found = load(root)
    assert found.samples[0].boxes.tolist() == [[15, 12, 25, 18]]
    assert kinds(found) == ["pose-labels"]


@pytest.mark.parametrize("count", [1, 2, 17])
def test_poses_with_visibility_are_known_without_data_yaml(tmp_path, count):
    found = load(yolo(tmp_path, line="1 0.5 0.5 0.25 0.2 " + "0.4 0.6 2 " * count + "\n"))
    assert found.samples[0].boxes.tolist() == [[15, 12, 25, 18]]
    assert kinds(found) == ["pose-labels"]


def test_polygons_and_turned_boxes_stay_polygons(tmp_path):
    corners = "0 0.1 0.2 0.5 0.2 0.5 0.4 0.1 0.4\n0 1 1 0 1 1 1 0 1 1 1\n0 0.1 0.1 0.3 0.1 0.3 0.4\n"
    found = load(yolo(tmp_path, line=corners))
    assert found.samples[0].boxes[0].tolist() == pytest.approx([4, 6, 20, 12])
    assert "pose-labels" not in kinds(found) and "perhaps-pose-labels" not in kinds(found)


@pytest.mark.parametrize("words", ["x0 y0 x1 y1", "x0 y0 w h"])
def test_lines_of_corners_are_named_and_left_out(tmp_path, words, rng):
    low, size = rng.uniform(0, 0.4, (40, 2)), rng.uniform(0.3, 0.6, (40, 2))
    boxes = np.concatenate([low, low + size if words == "x0 y0 x1 y1" else size], axis=1)
    whole = "".join(f"0 {' '.join(f'{value:.4f}' for value in box)}\n" for box in boxes)
    found = load(yolo(tmp_path / "a", names=("a",), line=whole))
    assert kinds(found) == ["box-in-corners"] and found.issues[0].objects == 40 and words in found.issues[0].what
    right = np.concatenate([low + size / 2, size], axis=1)
    right[:12, 0] = 0.05  # objects that the border cuts, as drawn by people who continue them beyond it
    whole = "".join(f"0 {' '.join(f'{value:.4f}' for value in box)}\n" for box in right)
    assert set(kinds(load(yolo(tmp_path / "b", names=("a",), line=whole)))) == {"box-cut"}


def test_lines_of_one_length_may_be_poses_and_are_named(tmp_path):
    line = "1 0.5 0.5 0.25 0.2 " + " ".join(["0.45"] * 24) + "\n"
    found = load(yolo(tmp_path, names=("a", "b", "c", "d"), line=line))
    assert "perhaps-pose-labels" in kinds(found)


@pytest.mark.parametrize(
    "names, folder, split",
    [
        ("classes.txt", ".", "train"),
        ("obj.names", "obj_train_data", "obj_train_data"),
        ("train/_darknet.labels", "train", "train"),
        ("train/classes.txt", "train", "train"),
    ],
)
def test_label_files_next_to_their_images_are_found(tmp_path, names, folder, split):
    text(tmp_path / names, "cat\ndog\n")
    for seed, name in enumerate("ab"):
        put_image(tmp_path / folder / f"{name}.jpg", seed)
        text(tmp_path / folder / f"{name}.txt", "1 0.5 0.5 0.25 0.2\n")
    found = load(tmp_path, split)
    assert [len(sample.boxes) for sample in found.samples] == [1, 1]
    assert kinds(found) == []


def test_an_empty_line_between_numbered_names_is_refused_and_none_at_the_end(tmp_path):
    (yolo(tmp_path) / "data.yaml").unlink()
    text(tmp_path / "classes.txt", "cat\ndog\n\n \n")
    assert [info.name for info in load(tmp_path).classes] == ["cat", "dog"]
    text(tmp_path / "classes.txt", "cat\n\ndog\n")
    with pytest.raises(DataError, match=r"classes\.txt, line 2: empty"):
        load(tmp_path)


def test_each_folder_s_own_list_numbers_its_classes_and_splits_are_matched_by_name(tmp_path):
    for seed, (split, names) in enumerate((("train", "cat\ndog\n"), ("valid", "dog\ncat\n"))):
        put_image(tmp_path / split / "a.jpg", seed)
        text(tmp_path / split / "a.txt", "1 0.5 0.5 0.25 0.2\n")
        text(tmp_path / split / "_darknet.labels", names)
    train = load(tmp_path, "train")
    val = layouts.load(tmp_path, "val", classes=train.classes, owner="train")
    assert [train.classes[found.samples[0].labels[0]].name for found in (train, val)] == ["dog", "cat"]
    text(tmp_path / "classes.txt", "cat\ndog\n")
    with pytest.raises(DataError, match="give other names to the same numbers"):
        load(tmp_path, "val")


def test_the_lists_that_darknet_s_obj_data_names_are_the_splits(tmp_path):
    text(tmp_path / "obj.names", "cat\ndog\n")
    text(tmp_path / "obj.data", "classes = 2\ntrain=data/mine.txt\nvalid = data/other.txt\nnames = data/obj.names\n")
    for seed, (name, listing) in enumerate((("a", "mine"), ("b", "other"))):
        put_image(tmp_path / "obj_train_data" / f"{name}.jpg", seed)
        text(tmp_path / "obj_train_data" / f"{name}.txt", "1 0.5 0.5 0.25 0.2\n")
        text(tmp_path / f"{listing}.txt", f"data/obj_train_data/{name}.jpg\n")
    assert layouts.splits(tmp_path) == {"train": 1, "val": 1}
    assert [sample.path.name for sample in load(tmp_path, "val").samples] == ["b.jpg"]
    (tmp_path / "other.txt").unlink()
    with pytest.raises(DataError, match=r"obj\.data: valid: 'data/other\.txt' is not a folder or list"):
        layouts.splits(tmp_path)


def test_a_path_to_another_folder_is_named_with_what_to_do(tmp_path):
    (yolo(tmp_path / "pets") / "data.yaml").unlink()
    text(tmp_path / "project" / "data.yaml", "path: ../pets\nnames: [cat, dog]\ntrain: images/train\n")
    with pytest.raises(DataError, match=rf"its path is {tmp_path / 'pets'}: copy data\.yaml there"):
        layouts.splits(tmp_path / "project")


@pytest.mark.parametrize(
    "lines, said",
    [
        ("Train: gone.txt", "Train: 'gone.txt' is not a folder or list"),
        ("train: {a: images/train}", "train: .* is not a folder or list"),
        ("train: images/train\nval: images/train\nvalid: images", "valid is one of two names of the split val"),
    ],
)
def test_a_split_that_cannot_be_meant_is_refused(tmp_path, lines, said):
    with pytest.raises(DataError, match=said):
        layouts.splits(yolo(tmp_path, f"names: [cat, dog]\n{lines}\n"))


def test_linked_folders_of_images_and_labels_are_followed(tmp_path):
    yolo(tmp_path, names=("a",))
    put_image(tmp_path / "pool" / "x.jpg", 5)
    text(tmp_path / "poollabels" / "x.txt", "0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "images" / "train" / "more").symlink_to("../../pool")
    (tmp_path / "labels" / "train" / "more").symlink_to("../../poollabels")
    found = load(tmp_path)
    assert [len(sample.boxes) for sample in found.samples] == [1, 1]
    assert kinds(found) == []


def test_a_label_file_of_200_000_lines_is_refused_at_once(tmp_path):
    text(yolo(tmp_path) / "labels" / "train" / "a.txt", "0 0.5 0.5 0.1 0.1\n" * 200_000)
    begun = time.process_time()
    assert kinds(load(tmp_path)) == ["unreadable-annotation"]
    assert time.process_time() - begun < 1


def test_a_split_without_any_label_file_says_where_they_were_looked_for(tmp_path):
    yolo(tmp_path, labels="label/train")
    said = [issue for issue in load(tmp_path).issues if issue.kind == "no-labels"]
    assert len(said) == 1 and "none of 2 images" in said[0].what and "labels/" in said[0].what


def test_without_pyyaml_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependency, match=r"data\.yaml cannot be read: pyyaml.*run: pip install pyyaml"):
        load(yolo(tmp_path))


def test_a_link_that_was_unpacked_as_text_is_named(tmp_path):
    yolo(tmp_path, names=("a",))
    put_image(tmp_path / "pool" / "x.jpg", 5)
    link = text(tmp_path / "images" / "train" / "more", "../../pool")
    text(tmp_path / "images" / "train" / "LICENSE", "free")
    (named,) = load(tmp_path).issues
    assert (named.kind, named.where, named.fatal) == ("link-as-text", str(link), True)
