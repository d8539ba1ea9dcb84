"""The bootstrap against pycocotools on resampled sets, against formulas, and by simulation."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from edgedetr.evaluation import bootstrap
from edgedetr.evaluation.coco_metrics import ClassMatches, DetectionMatches, evaluate
from edgedetr.evaluation.reference import GroundTruth


def test_identity_equals_pycocotools_on_recorded_sets(recorded):
    truth, found, expected = recorded
    ap = bootstrap.resampled_ap(evaluate(truth, found).matches, np.ones((1, len(truth)), int))
    assert ap[0] == pytest.approx(100 * expected["stats"]["AP"], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("quality", [0.02, 0.2])
def test_identity_equals_pycocotools_on_random_sets(random_set, seed, quality):
    metrics = evaluate(*random_set(seed, images=3 + 5 * seed, classes=1 + seed, quality=quality))
    ap = bootstrap.resampled_ap(metrics.matches, np.ones((1, metrics.matches.images), int))
    assert ap[0] == pytest.approx(metrics.ap, abs=1e-9)


def repeated(truth: GroundTruth, found: dict, counts: np.ndarray) -> tuple[GroundTruth, dict]:
    """The resample written out as its own data set: copies of images under new ids.

    Copies of one image stand side by side in the order of the original ids, because pycocotools ranks detections of
    equal score by image id. Within one image equal scores would be ranked copy by copy, which a resample by counts
    has no reason to imitate: callers make scores distinct.
    """
    order = np.argsort(truth.image_ids)
    rows = np.repeat(order, counts[order])
    objects = [np.flatnonzero(truth.image == row) for row in rows]
    flat = np.concatenate([np.zeros(0, int), *objects])
    new = GroundTruth(
        truth.classes,
        np.arange(1, len(rows) + 1),
        truth.names[rows],
        truth.digests[rows],
        truth.sizes[rows],
        np.repeat(np.arange(len(rows)), [len(o) for o in objects]),
        truth.boxes[flat],
        truth.labels[flat],
        truth.crowd[flat],
        truth.areas[flat],
    )
    return new, {n + 1: found[int(truth.image_ids[row])] for n, row in enumerate(rows)}


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_equals_pycocotools_on_the_set_written_out(random_set, rng, seed):
    truth, found = random_set(seed, images=12, classes=4)
    found = {i: replace(d, confidence=d.confidence + rng.uniform(0, 1e-6, len(d))) for i, d in found.items()}
    counts = bootstrap.draw(12, 3, seed)
    ours = bootstrap.resampled_ap(evaluate(truth, found).matches, counts)
    for row, ap in zip(counts, ours):
        assert ap == pytest.approx(evaluate(*repeated(truth, found, row)).ap, abs=1e-9)


def test_a_class_without_objects_in_a_resample_leaves_the_mean():
    perfect = ClassMatches(np.array([0]), np.ones((10, 1), bool), np.zeros((10, 1), bool), np.array([1, 0]))
    missed = ClassMatches(np.zeros(0, int), np.ones((10, 0), bool), np.zeros((10, 0), bool), np.array([0, 1]))
    ap = bootstrap.resampled_ap(DetectionMatches((perfect, missed), 2), np.array([[1, 1], [2, 0], [0, 2]]))
    np.testing.assert_allclose(ap, [50, 100, 0])


def test_a_resample_without_any_object_is_not_counted():
    lonely = ClassMatches(np.array([0]), np.ones((10, 1), bool), np.zeros((10, 1), bool), np.array([1, 0]))
    assert np.isnan(bootstrap.resampled_ap(DetectionMatches((lonely,), 2), np.array([[0, 2]]))[0])
    result = bootstrap.paired(DetectionMatches((lonely,), 2), DetectionMatches((lonely,), 2), resamples=200)
    assert 0 < result.resamples < 200
    assert (result.drop, result.upper, result.se) == (0, 0, 0)


def coins(outcome: np.ndarray) -> DetectionMatches:
    """One object per image, of one class; detected or not, no false alarms: AP is near the recall."""
    images = np.flatnonzero(outcome)
    hit = np.ones((1, len(images)), bool)  # one IoU threshold is enough here
    return DetectionMatches((ClassMatches(images, hit, ~hit, np.ones(len(outcome), np.int64)),), len(outcome))


def test_standard_error_is_the_binomial_one_where_ap_is_a_fraction(rng):
    n = 400
    first, second = np.ones(n, bool), rng.uniform(size=n) < 0.8
    result = bootstrap.paired(coins(first), coins(second), resamples=2000, seed=1)
    lost = 1 - second.mean()
    # AP counts recall thresholds reached, in steps of 1/101 of a point: at most 1 point off
    assert result.drop == pytest.approx(100 * lost, abs=1)
    # 2000 resamples know the standard error to 1.6 %; the steps of 1/101 add about 3 %
    assert result.se == pytest.approx(100 * np.sqrt(lost * (1 - lost) / n), rel=0.1)
    assert result.upper == pytest.approx(result.drop + 1.645 * result.se, abs=1)  # AP moves in steps of 1/101
    assert result.lower < result.drop < result.upper
    assert result.margin == pytest.approx(result.upper - result.drop)


def test_pairing_makes_the_bound_narrow(rng):
    outcome = rng.uniform(size=300) < 0.6
    other = outcome.copy()
    other[np.flatnonzero(outcome)[:6]] = False  # six objects lost, the rest in common
    result = bootstrap.paired(coins(outcome), coins(other), resamples=1000)
    unpaired = 100 * np.sqrt(2 * 0.6 * 0.4 / 300)
    assert result.se < 0.4 * unpaired  # 0.8 against 4 points


def test_the_bound_holds_about_95_times_in_a_hundred():
    """200 worlds of 150 images, the second system truly loses 10 points: how often is the truth below the bound?"""
    rng = np.random.default_rng(5)
    held = 0
    for world in range(200):
        first = rng.uniform(size=150) < 0.7
        second = first & (rng.uniform(size=150) > 1 / 7)
        result = bootstrap.paired(coins(first), coins(second), resamples=200, seed=world)
        held += result.upper >= 1000 / 101 - 1e-9  # recall .7 reaches 71 of the 101 thresholds, .6 reaches 61
    # 190 expected, with a binomial standard deviation of 3.1; a skewed count of 15 in 150 costs the percentile method
    # about 2 in a hundred
    assert 178 <= held <= 199


def test_the_same_seed_gives_the_same_bound_and_another_one_does_not(random_set):
    a, b = (evaluate(*random_set(4, quality=q)).matches for q in (0.05, 0.05))
    c = evaluate(*random_set(9)).matches
    assert bootstrap.paired(a, c, resamples=100, seed=3) == bootstrap.paired(b, c, resamples=100, seed=3)
    assert bootstrap.paired(a, c, resamples=100, seed=3) != bootstrap.paired(a, c, resamples=100, seed=4)


def test_counts_of_another_set_are_refused(random_set):
    with pytest.raises(ValueError, match=r"expected \[R, 20\]"):
        bootstrap.resampled_ap(evaluate(*random_set(1)).matches, np.ones((2, 19), int))


def test_a_thousand_resamples_of_800_images_take_seconds(rng):
    images, per_image, classes = 800, 20, 4
    made = []
    for _ in range(classes):
        size = images * per_image
        hit = np.sort(rng.uniform(size=size))[None, ::-1] * np.linspace(1, 0.3, 10)[:, None] > 0.9
        made.append(ClassMatches(rng.integers(0, images, size), hit, np.zeros_like(hit), np.full(images, 3)))
    start = time.process_time()
    bootstrap.resampled_ap(DetectionMatches(tuple(made), images), bootstrap.draw(images, 1000))
    assert time.process_time() - start < 10  # seconds of one core; measured 2
