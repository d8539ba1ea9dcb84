"""COCO metrics against pycocotools' recorded numbers and against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest

from edgedetr.bundle import ClassInfo
from edgedetr.errors import DataError
from edgedetr.evaluation.coco_metrics import Metrics, evaluate
from edgedetr.evaluation.reference import GroundTruth
from edgedetr.runtime.postprocess import Detections

NUMBERS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "AR100": "ar100",
}


def test_recorded_numbers_of_pycocotools_to_1e_6(recorded):
    truth, found, expected = recorded
    metrics = evaluate(truth, found)
    for theirs, ours in NUMBERS.items():
        value = expected["stats"][theirs]
        assert getattr(metrics, ours) == (None if value == -1 else pytest.approx(100 * value, abs=1e-6)), theirs
    names = {str(c.category_id): c.name for c in truth.classes}
    assert len(expected["per_class_AP"]) == len(metrics.per_class)
    for number, value in expected["per_class_AP"].items():
        assert metrics.per_class[names[number]] == (None if value == -1 else pytest.approx(100 * value, abs=1e-6))


CLASSES = (ClassInfo(0, 1, "thing"), ClassInfo(1, 2, "other"))
EXACT, HALF, AWAY = [10, 10, 50, 50], [10, 10, 50, 30], [60, 60, 90, 90]


def one_object(boxes, scores, labels, crowd=False) -> Metrics:
    """Metrics of detections on one image with one object (10, 10, 50, 50) of class 0."""
    truth = GroundTruth(
        CLASSES,
        np.array([0]),
        np.array(["a"]),
        np.array([""]),
        np.array([[100, 100]]),
        np.array([0]),
        np.array([[10.0, 10, 50, 50]]),
        np.array([0]),
        np.array([crowd]),
        np.array([1600.0]),
    )
    found = Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores), np.array(labels, int))
    return evaluate(truth, {0: found})


@pytest.mark.parametrize(
    "boxes, scores, labels, ap, ap50",
    [
        ([EXACT], [0.9], [0], 100, 100),  # image id 0 and the first annotation are not lost
        ([HALF], [0.9], [0], 10, 100),  # IoU 0.5: hit at the first of ten thresholds only
        ([AWAY, EXACT], [0.9, 0.8], [0, 0], 50, 50),  # one false alarm before the hit: precision 1/2
        ([EXACT, AWAY], [0.9, 0.8], [0, 0], 100, 100),  # after it: costs nothing
        ([EXACT, EXACT], [0.9, 0.8], [0, 0], 100, 100),  # a duplicate below the hit costs nothing
        ([EXACT], [0.9], [1], 0, 0),  # another class
        ([], [], [], 0, 0),
    ],
)
def test_hand_worked_images(boxes, scores, labels, ap, ap50):
    metrics = one_object(boxes, scores, labels)
    assert metrics.ap == pytest.approx(ap)
    assert metrics.ap50 == pytest.approx(ap50)
    assert metrics.per_class == {"thing": pytest.approx(ap), "other": None}


def test_a_set_of_crowds_has_no_ap():
    metrics = one_object([EXACT], [0.9], [0], crowd=True)
    assert metrics.ap is None
    assert metrics.ap50 is None
    assert metrics.ar100 is None
    assert metrics.to_json()["ap"] is None
    assert "matches" not in metrics.to_json()


def test_missing_images_count_as_empty_and_unknown_ones_are_refused(random_set):
    truth, found = random_set(3)
    first = int(truth.image_ids[0])
    empty = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    without = {i: d for i, d in found.items() if i != first}
    assert evaluate(truth, without).ap == evaluate(truth, {**found, first: empty}).ap
    with pytest.raises(DataError, match="image id 5, which the ground truth does not have"):
        evaluate(truth, {**found, 5: empty})


def test_no_images_is_an_error(random_set):
    truth, _ = random_set(1)
    with pytest.raises(DataError, match="no images"):
        evaluate(truth.subset([]), {})


def test_leaving_sizes_out_changes_nothing_else(random_set):
    whole, without_sizes = evaluate(*random_set(4)), evaluate(*random_set(4), by_size=False)
    names = ("ap", "ap50", "ap75", "ar100", "per_class")
    assert [getattr(without_sizes, n) for n in names] == [getattr(whole, n) for n in names]
    assert (without_sizes.ap_small, without_sizes.ap_medium, without_sizes.ap_large) == (None, None, None)
    for a, b in zip(without_sizes.matches.classes, whole.matches.classes):
        np.testing.assert_array_equal(a.hit, b.hit)
        np.testing.assert_array_equal(a.objects, b.objects)


def test_pycocotools_prints_nothing(random_set, capsys):
    evaluate(*random_set(2))
    assert capsys.readouterr().out == ""
