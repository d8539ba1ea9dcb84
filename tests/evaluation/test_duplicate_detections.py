"""Duplicate detections, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgedetr.evaluation.duplicate_detections import duplicate_percentage
from edgedetr.runtime.postprocess import Detections


def found(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


def test_a_second_box_on_the_same_object_counts_once_and_other_classes_or_faint_ones_do_not() -> None:
    one = found(
        (0, 0, 10, 10, 0.6, 0),
        (0, 0, 10, 10, 0.9, 0),
        (0, 0, 10, 9, 0.5, 0),  # one object, three times
        (0, 0, 10, 10, 0.8, 1),  # another class
        (20, 20, 30, 30, 0.9, 0),
        (25, 20, 35, 30, 0.9, 0),  # neighbors: IoU 1/3
        (0, 0, 10, 10, 0.2, 0),
    )  # too faint to be shown
    two = found((0, 0, 10, 10, 0.9, 0))  # another image
    assert duplicate_percentage({1: one, 2: two}) == pytest.approx(100 * 2 / 7)


def test_without_detections_there_is_no_percentage() -> None:
    assert duplicate_percentage({1: found((0, 0, 10, 10, 0.1, 0)), 2: found()}) is None
