"""The matched distance against plain loops, numbers worked out by hand, and its properties."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest

from edgedetr.quantization.matched_distance import QueryOutputs, distance, distances
from edgedetr.runtime.backends.base import RawOutputs

ACTIVATIONS = ("sigmoid", "softmax")


def outputs(rng, queries=9, classes=4, spread=2.0):
    logits = rng.normal(-1, spread, (1, queries, classes)).astype(np.float32)
    low = rng.uniform(0, 0.5, (1, queries, 2))
    boxes = np.concatenate([low + 0.2, rng.uniform(0.05, 0.4, (1, queries, 2))], axis=2).astype(np.float32)
    return RawOutputs(logits, boxes)


def moved(raw, rng, amount):
    logits = raw.logits + amount * rng.normal(0, 1, raw.logits.shape)
    boxes = raw.boxes + 0.05 * amount * rng.normal(0, 1, raw.boxes.shape)
    return RawOutputs(logits.astype(np.float32), np.clip(boxes, 0.01, 1).astype(np.float32))


# ------------------------------------------------------------------------------------- the definition, by plain loops


def probabilities(logits, activation):
    if activation == "sigmoid":
        return [[1 / (1 + math.exp(-z)) for z in row] for row in logits.tolist()]
    return [[math.exp(z) / sum(math.exp(y) for y in row) for z in row] for row in logits.tolist()]


def giou(a, b):
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inside = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - inside
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inside / union - (hull - union) / hull


def by_loops(teacher, student, activation, by_identity):
    t, s = probabilities(teacher.logits[0], activation), probabilities(student.logits[0], activation)
    tb, sb = teacher.boxes[0].tolist(), student.boxes[0].tolist()
    classes = len(t[0]) - (activation == "softmax")
    best = [max(row[:classes]) for row in t]
    found = [i for i in range(len(t)) if best[i] >= 0.05]

    def pair(i, j):
        label = t[i].index(best[i])
        l1 = sum(abs(x - y) for x, y in zip(tb[i], sb[j]))
        return 2 * abs(t[i][label] - s[j][label]) + 5 * l1 + 2 * (1 - giou(tb[i], sb[j]))

    if by_identity:
        chosen = found
    else:
        chosen = min(
            permutations(range(len(s)), len(found)), key=lambda order: sum(pair(i, j) for i, j in zip(found, order))
        )
    total = 0.0
    for i, j in zip(found, chosen):
        apart = 0.0
        for p, q in zip(t[i], s[j]):
            apart += p * math.log(p / q)
            if activation == "sigmoid":
                apart += (1 - p) * math.log((1 - p) / (1 - q))
        apart += 5 * sum(abs(x - y) for x, y in zip(tb[i], sb[j])) + 2 * (1 - giou(tb[i], sb[j]))
        total += best[i] * apart
    spurious = sum(max(row[:classes]) for j, row in enumerate(s) if j not in chosen and max(row[:classes]) >= 0.3)
    return total / sum(best[i] for i in found) + spurious


@pytest.mark.parametrize("by_identity", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_what_the_definition_says_computed_with_loops(rng, activation, by_identity):
    teacher = outputs(rng, queries=6)
    student = moved(teacher, rng, 0.7)
    found = distances(teacher, student, activation, by_identity=by_identity)[0]
    assert found == pytest.approx(by_loops(teacher, student, activation, by_identity), rel=1e-5)


def test_two_detections_worked_out_by_hand():
    """Scores 0.8 and 0.2. One keeps its place and goes from 0.8 to 0.5; the other moves by half its width.

    Class: 0.8 ln(0.8/0.5) + 0.2 ln(0.2/0.5) = 0.192745. Box of 0.2 x 0.2 moved by 0.1: L1 0.1, IoU 1/3 and no empty
    part of the hull, so GIoU 1/3: 5 * 0.1 + 2 * 2/3 = 1.833333. Weighed: 0.8 * 0.192745 + 0.2 * 1.833333.
    """
    boxes = np.array([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]])
    logit = {p: math.log(p / (1 - p)) for p in (0.8, 0.5, 0.2)}
    teacher = RawOutputs(np.array([[[logit[0.8]], [logit[0.2]]]]), boxes)
    student = RawOutputs(np.array([[[logit[0.5]], [logit[0.2]]]]), boxes + np.array([[[0] * 4, [0.1, 0, 0, 0]]]))
    expected = 0.8 * 0.192745 + 0.2 * 1.833333
    for by_identity in (True, False):
        assert distances(teacher, student, "sigmoid", by_identity=by_identity)[0] == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("by_identity", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_outputs_have_distance_zero(rng, activation, by_identity):
    for queries in (1, 9, 150):  # 150: more detections than are matched
        raw = outputs(rng, queries=queries, spread=4)
        assert distances(raw, raw, activation, by_identity=by_identity)[0] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_order_of_the_queries_does_not_matter_where_they_are_matched(rng, activation):
    teacher, order = outputs(rng), rng.permutation(9)
    student = moved(teacher, rng, 0.3)
    shuffled = RawOutputs(student.logits[:, order], student.boxes[:, order])
    direct = distances(teacher, student, activation, by_identity=False)
    assert distances(teacher, shuffled, activation, by_identity=False) == pytest.approx(direct)
    assert distances(teacher, shuffled, activation, by_identity=True) > direct


@pytest.mark.parametrize("by_identity", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_grows_with_the_perturbation(activation, by_identity):
    means = []
    for amount in (0.02, 0.1, 0.5, 2.0):
        rng = np.random.default_rng(7)
        pairs = [(teacher := outputs(rng, queries=30), moved(teacher, rng, amount)) for _ in range(10)]
        means.append(np.mean([distances(*pair, activation, by_identity=by_identity) for pair in pairs]))
    assert all(2 * small < large for small, large in pairwise(means)), means


def test_a_detection_that_only_the_student_has_counts_with_its_score():
    boxes = np.array([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    teacher = QueryOutputs.of(np.array([[3.0], [-9.0]]), boxes, "sigmoid")
    for logit, score in ((1.0, 1 / (1 + math.exp(-1.0))), (-2.0, 0.0)):
        student = QueryOutputs.of(np.array([[3.0], [logit]]), boxes, "sigmoid")
        for by_identity in (True, False):
            assert distance(teacher, student, by_identity=by_identity) == pytest.approx(score, abs=1e-12)


def test_background_that_changes_below_the_threshold_costs_nothing():
    boxes = np.array([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    teacher = QueryOutputs.of(np.array([[3.0], [-9.0]]), boxes, "sigmoid")
    student = QueryOutputs.of(np.array([[3.0], [-5.0]]), boxes + np.array([[0] * 4, [0.1] * 4]), "sigmoid")
    assert distance(teacher, student, by_identity=True) == 0


def test_an_image_without_detections_has_only_what_the_student_invents():
    boxes = np.full((2, 4), 0.5)
    nothing = QueryOutputs.of(np.full((2, 1), -9.0), boxes, "sigmoid")
    invents = QueryOutputs.of(np.array([[-9.0], [0.0]]), boxes, "sigmoid")
    assert distance(nothing, nothing, by_identity=False) == 0
    assert distance(nothing, invents, by_identity=False) == pytest.approx(0.5)
