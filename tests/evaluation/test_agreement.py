"""Matched detections, by hand and against a brute-force assignment."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from edgedetr.boxes import iou
from edgedetr.evaluation.agreement import compare_detections, matched_pairs
from edgedetr.runtime.postprocess import Detections


def found(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


A = (0, 0, 10, 10, 0.9, 0)
B = (50, 50, 70, 70, 0.5, 1)


def test_equal_systems_are_equal():
    result = compare_detections({1: found(A, B)}, {1: found(A, B)})
    assert (result.objects, result.matched, result.spurious) == (2, 1.0, 0.0)
    assert (result.score_mean, result.box_p99) == (0, 0)


def test_a_hand_worked_difference():
    other = found(
        (0, 0, 10, 12, 0.8, 0),  # A: corner off by 2, score by 0.1
        (50, 50, 70, 70, 0.5, 0),  # B's position, another class: missed and spurious
        (90, 90, 95, 95, 0.2, 0),
    )  # below the threshold: nobody minds
    result = compare_detections({1: found(A, B)}, {1: other})
    assert (result.objects, result.matched, result.spurious) == (2, 0.5, 0.5)
    assert result.score_mean == pytest.approx(0.1, abs=1e-6)  # float32 scores
    assert result.box_mean == pytest.approx(2)


@pytest.mark.parametrize("mine, theirs", [(0.31, 0.29), (0.29, 0.31)])
def test_crossing_the_threshold_is_another_score_and_not_another_object(mine, theirs):
    result = compare_detections({1: found((*A[:4], mine, 0))}, {1: found((*A[:4], theirs, 0))})
    assert result.matched in (1.0, None)
    assert result.spurious in (0.0, None)


def test_one_detection_answers_for_one_object_only():
    result = compare_detections({1: found(A, A)}, {1: found(A)})
    assert (result.objects, result.matched) == (2, 0.5)


def test_nothing_to_compare_gives_none_and_not_nan():
    result = compare_detections({1: found()}, {1: found()})
    assert result.to_json() == {
        "objects": 0,
        "matched": None,
        "spurious": None,
        "score_mean": None,
        "score_p99": None,
        "box_mean": None,
        "box_p99": None,
    }
    assert compare_detections({1: found(A)}, {1: found()}).matched == 0


def test_only_images_of_both_count():
    assert compare_detections({1: found(A), 2: found(A)}, {1: found(A), 3: found(A)}).objects == 1


def test_greedy_pairs_are_nearly_the_best_assignment(rng):
    """Where detections differ little, greedy by overlap finds the assignment of the largest total overlap."""
    low = rng.uniform(0, 200, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(20, 60, (40, 2))], axis=1)
    a = Detections(boxes.astype(np.float32), np.ones(40, np.float32), rng.integers(0, 3, 40))
    order = rng.permutation(40)
    b = Detections(
        (boxes + rng.normal(0, 1, boxes.shape))[order].astype(np.float32), np.ones(40, np.float32), a.class_id[order]
    )
    first, second = matched_pairs(a, b, 0.5)
    overlap = iou(a.xyxy.astype(float), b.xyxy.astype(float)) * (a.class_id[:, None] == b.class_id)
    rows, columns = linear_sum_assignment(-np.where(overlap >= 0.5, overlap, 0))
    best = {(r, c) for r, c in zip(rows, columns) if overlap[r, c] >= 0.5}
    assert set(zip(first, second)) == best
