"""Paired bootstrap of an AP drop: the same resampled images for both systems, from cached matches.

Efron and Tibshirani 1993, chapters 6 and 13 (percentile interval). A resample is a count per image, so detections are
matched and sorted once, and only true positives can change the precision-recall envelope: 1000 resamples of 800 images
take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgedetr.evaluation.coco_metrics import ClassMatches, DetectionMatches

RECALLS = np.linspace(0.0, 1.00, 101)  # pycocotools' recThrs
TINY = np.spacing(1)  # pycocotools adds it to the denominator of precision
CELLS = 4_000_000  # resamples x detections held at a time: 32 MB per array


@dataclass(frozen=True)
class PairedDrop:
    """AP of a reference minus AP of another model on the same images, points.

    drop          on the images without resampling
    lower, upper  one-sided 95 % percentile bounds each (5th and 95th percentile of the resampled drops)
    se            standard deviation of the resampled drops
    margin        upper - drop, at least 0: differences that these images cannot resolve. A model that varies as much
                  as this one and loses nothing passes with a tolerance of `margin`, not with a smaller one
    """

    drop: float
    lower: float
    upper: float
    se: float
    margin: float
    resamples: int


def draw(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Number of times that each image is in each resample: [R, I] int64, rows sum to I."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples)


def resampled_ap(matches: DetectionMatches, counts: np.ndarray) -> np.ndarray:
    """AP in points of every resample.

    counts   [R, I]  number of times that each image is in
    return   [R]     mean over the classes that have an object in the resample; NaN where none has
    """
    if counts.ndim != 2 or counts.shape[1] != matches.images:
        raise ValueError(f"counts are {list(counts.shape)}, expected [R, {matches.images}]")
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for matched in matches.classes:
        objects = counts @ matched.objects
        step = max(1, CELLS // max(1, len(matched.image)))
        for start in range(0, len(counts), step):
            rows = slice(start, start + step)
            total[rows] += np.where(objects[rows] > 0, _class_ap(matched, counts[rows], objects[rows]), 0)
        present += objects > 0
    with np.errstate(invalid="ignore"):
        return 100 * total / present


def paired(reference: DetectionMatches, other: DetectionMatches, *, resamples: int = 1000, seed: int = 0) -> PairedDrop:
    """Bootstrap of AP(reference) - AP(other); both matched on the same images in the same order."""
    counts = draw(reference.images, resamples, seed)
    return compare(resampled_ap(reference, with_identity(counts)), resampled_ap(other, with_identity(counts)))


def with_identity(counts: np.ndarray) -> np.ndarray:
    """The resamples, preceded by one row that takes every image once."""
    return np.concatenate([np.ones((1, counts.shape[1]), counts.dtype), counts])


def compare(reference_ap: np.ndarray, other_ap: np.ndarray) -> PairedDrop:
    """The drop and its bounds from the APs [1 + R] of two models over the same resamples, the identity first."""
    drops = reference_ap - other_ap
    drop, resampled = float(drops[0]), drops[1:][np.isfinite(drops[1:])]
    if not resampled.size:
        return PairedDrop(drop, -100.0, 100.0, float("nan"), 100.0, 0)  # no usable resample: the widest bounds
    lower, upper = (float(v) for v in np.percentile(resampled, [5, 95]))
    return PairedDrop(drop, lower, upper, float(resampled.std()), max(0.0, upper - drop), len(resampled))


def _class_ap(matched: ClassMatches, counts: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """101-point interpolated AP of one class, mean over IoU thresholds: counts [R, I], objects [R] -> [R] in 0..1.

    Precision rises only at a hit, so the envelope at the hits is sufficient. A hit that raises the number of hits
    from m to n sets the precision at the recall thresholds in (m / objects, n / objects]; the first hit also at
    threshold 0.
    """
    weight = counts.astype(np.int32)[:, matched.image]  # [R, D]
    seen = np.cumsum(weight, axis=1, dtype=np.int32)  # detections so far, with multiplicity
    result = np.zeros(len(counts))
    for hit, ignored in zip(matched.hit, matched.ignored):
        at = np.flatnonzero(hit)
        if not at.size:
            continue
        hits = np.cumsum(weight[:, at], axis=1)  # [R, P]
        judged = seen[:, at] - np.cumsum(weight * ignored, axis=1)[:, at] if ignored.any() else seen[:, at]
        precision = hits / (judged + TINY)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, hits / np.maximum(objects, 1)[:, None], side="right")
        reached[hits == 0] = 0  # threshold 0 belongs to the first hit
        gained = np.diff(reached, axis=1, prepend=0)
        result += (envelope * gained).sum(axis=1) / len(RECALLS)
    return result / len(matched.hit)
