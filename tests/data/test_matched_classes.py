"""Classes are matched by name wherever two sets, or a set and a model, meet: order and ids are each side's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sets import coco, tables, text, yolo

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.data import layouts
from edgedetr.data.detection_set import DetectionSet, match_classes, without_empty_classes
from edgedetr.errors import DataError
from edgedetr.evaluation.artifacts_run import load_split
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.reference import Reference
from edgedetr.runtime.postprocess import named


def classes(*names: str, ids: tuple[int, ...] | None = None) -> tuple[ClassInfo, ...]:
    return tuple(ClassInfo(index, ids[index] if ids else index, name) for index, name in enumerate(names))


def seen(found: DetectionSet) -> list[list[str]]:
    """The names of each image's objects: what must not change."""
    return [[found.classes[label].name for label in sample.labels] for sample in found.samples]


@pytest.mark.parametrize("names", [("dog", "cat"), ("bird", "dog", "cat"), ("DOG", "Cat"), ("cat", "dog", "cow")])
def test_objects_keep_their_names_under_another_order(tmp_path, names):
    found = layouts.load(coco(tmp_path), "train", classes=classes(*names))
    assert [[name.lower() for name in image] for image in seen(found)] == [["cat", "dog"]] * 2
    assert [info.name for info in found.classes] == list(names)


def test_a_class_of_the_set_alone_is_dropped_without_objects_and_refused_with(tmp_path):
    content = tables(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "pets"}])
    root = coco(tmp_path, content=content)
    assert seen(layouts.load(root, "train", classes=classes("dog", "cat"))) == [["cat", "dog"]] * 2
    with pytest.raises(DataError, match="class 'dog', which in the model is not among cat, dogs; did you mean 'dogs'"):
        layouts.load(root, "train", classes=classes("cat", "dogs"))


def test_a_class_that_the_set_does_not_name_is_said(tmp_path, caplog):
    layouts.load(coco(tmp_path), "train", classes=classes("cat", "dog", "cow"))
    assert "does not have the class 'cow' of the model" in caplog.text


def test_equal_names_are_matched_by_id_or_refused(tmp_path):
    content = tables(categories=[{"id": 1, "name": "helmet"}, {"id": 2, "name": "helmet"}])
    found = layouts.load(coco(tmp_path, content=content), "train")
    turned = match_classes(found, classes("helmet", "helmet", ids=(2, 1)), "the model")
    assert [sample.labels.tolist() for sample in turned.samples] == [[1, 0]] * 2
    with pytest.raises(DataError, match="the name of several classes"):
        match_classes(found, classes("helmet", "helmet", ids=(7, 8)), "the model")


def test_empty_classes_can_be_dropped_and_ids_stay(tmp_path):
    content = tables(categories=[{"id": 0, "name": "pets"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])
    found = without_empty_classes(layouts.load(coco(tmp_path, content=content), "train"))
    assert [(info.index, info.category_id, info.name) for info in found.classes] == [(0, 1, "cat"), (1, 2, "dog")]
    assert seen(found) == [["cat", "dog"]] * 2


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """A model of dog (id 90) and cat (id 7), whose verify split is `test`."""
    root = coco(
        tmp_path / "own",
        split="test",
        content=tables(
            categories=[{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
            annotations=[dict(row, category_id={1: 7, 2: 90}[row["category_id"]]) for row in tables()["annotations"]],
        ),
    )
    manifest = Manifest(
        "rt_detr",
        classes("cat", "dog", ids=(7, 90)),
        InputContract(32, 32),
        OutputContract(),
        data=DataRecord(str(root), "test", "train"),
    )
    return Bundle.create(tmp_path / "m.bundle", manifest)


def perfect(found: DetectionSet) -> dict:
    return {
        s.image_id: named(s.boxes.astype(np.float32), np.full(len(s.labels), 0.9, np.float32), s.labels, found.classes)
        for s in found.samples
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda root: yolo(root, "names: [dog, bird, cat]\ntest: images/train\n", line="0 0.5 0.5 0.25 0.2\n"),
        lambda root: coco(root, split="test"),
    ],
)
def test_a_set_with_other_ids_and_order_is_measured_in_the_model_s_classes(bundle, tmp_path, make):
    found = load_split(bundle, make(tmp_path / "other"))
    assert found.classes == bundle.manifest.classes
    assert "dog" in seen(found)[0]
    assert evaluate(found, perfect(found)).ap == pytest.approx(100)


@pytest.mark.parametrize("line", ["", "9 0.5 0.5 0.25 0.2\n", "nonsense\n"])
def test_a_split_without_objects_is_no_measure(bundle, tmp_path, line):
    root = yolo(tmp_path / "other", "names: [cat, dog]\ntest: images/train\n", line=line)
    with pytest.raises(DataError, match="no object to measure AP on; run: edgedetr data check"):
        load_split(bundle, root)


def test_the_bundle_s_own_set_is_as_it_was(bundle):
    found = load_split(bundle)
    assert found.classes == bundle.manifest.classes
    assert seen(found) == [["cat", "dog"]] * 2


def test_metrics_of_equal_names_are_separate(tmp_path):
    content = tables(categories=[{"id": 1, "name": "helmet"}, {"id": 2, "name": "helmet"}])
    found = layouts.load(coco(tmp_path, content=content), "train")
    answers = perfect(found)
    answers[0] = answers[0].above(1.0)
    assert evaluate(found, answers).per_class.keys() == {"helmet (id 1)", "helmet (id 2)"}


def test_ids_beyond_64_bits_go_through_metrics_and_reference(tmp_path):
    content = tables()
    for table, key in (("images", "id"), ("annotations", "image_id")):
        for row in content[table]:
            row[key] += 20240131123045000101
    found = layouts.load(coco(tmp_path, content=content), "train")
    assert evaluate(found, perfect(found)).ap == pytest.approx(100)
    Reference.of(found, perfect(found)).save(tmp_path / "r.npz")
    again = Reference.load(tmp_path / "r.npz")
    assert again.truth.image_ids.tolist() == [1, 2]
    assert [sample.original_id for sample in found.samples] == [20240131123045000101, 20240131123045000102]


def test_an_unpacked_archive_in_a_folder_of_its_name_is_pointed_to(tmp_path):
    coco(tmp_path / "pets" / "pets")
    text(tmp_path / "pets" / "__MACOSX" / "x", json.dumps({}))
    with pytest.raises(DataError, match=r"perhaps you mean .*pets/pets"):
        layouts.load(tmp_path / "pets", "train")
