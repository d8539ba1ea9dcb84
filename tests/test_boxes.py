"""Box arithmetic against hand-worked numbers and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from edgedetr import boxes


def test_a_hand_worked_box_has_the_corners_it_should():
    assert boxes.cxcywh_to_xyxy(np.array([50.0, 20.0, 10.0, 4.0])).tolist() == [45, 18, 55, 22]


def test_center_form_and_corner_form_are_inverse(rng):
    given = rng.uniform(-5, 5, (100, 4))
    assert boxes.xyxy_to_cxcywh(boxes.cxcywh_to_xyxy(given)) == pytest.approx(given, abs=1e-12)  # float64 rounding


def test_iou_equals_counting_cells_on_a_grid(rng):
    corners = np.sort(rng.integers(0, 12, (40, 2, 2)), axis=1).reshape(40, 4).astype(float)  # x0, y0, x1, y1
    masks = np.zeros((40, 12, 12), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners.astype(int)):
        mask[y0:y1, x0:x1] = True
    counted = np.array([[(a & b).sum() / max((a | b).sum(), 1) for b in masks] for a in masks])
    assert boxes.iou(corners, corners) == pytest.approx(counted, abs=1e-12)


def test_boxes_without_area_overlap_nothing_and_divide_by_nothing():
    points = np.array([[1.0, 1, 1, 1], [5, 5, 2, 2]])
    assert boxes.iou(points, points).tolist() == [[0, 0], [0, 0]]
    assert boxes.area(points).tolist() == [0, 0]


def test_clip_keeps_boxes_inside_height_and_width():
    assert boxes.clip(np.array([[-3.0, -2, 30, 20]]), height=10, width=25).tolist() == [[0, 0, 25, 10]]


def test_the_box_around_a_turned_box_is_that_of_its_turned_corners(rng):
    for x0, y0, w, h, degrees in rng.uniform(1, 100, (20, 5)) * [1, 1, 1, 1, 5]:
        corners = np.array([x0 + 1j * y0, x0 + w + 1j * y0, x0 + 1j * (y0 + h), x0 + w + 1j * (y0 + h)])
        center = corners.mean()
        turned = center + (corners - center) * np.exp(1j * np.radians(degrees))
        found = boxes.around_turned(np.array([x0, y0, x0 + w, y0 + h]), degrees)
        wanted = [turned.real.min(), turned.imag.min(), turned.real.max(), turned.imag.max()]
        assert found == pytest.approx(wanted, abs=1e-9)  # float64 rounding of pixels
