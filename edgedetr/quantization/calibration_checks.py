"""What a calibration says about itself: unsteady ranges, clipped values, and images unlike those of the training.

Each check gives its figures; `calibration.py` logs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgedetr.quantization.observers import BINS, Histogram

SHOWN = 5  # tensors that a message names

MOVED = 1.1  # a range counts as moved where it differs by this factor between the halves of the images
# Of the ranges: more of them are warned of. 128 of their own images, detectors trained on BCCD, cards and rendered
# scenes: mse 2 to 10 %, percentile 0 to 5 %, entropy 11 to 19 %, minmax 13 to 40 %.
MOVED_FRACTION = 0.25
# Of a tensor's values. Observers clip on purpose: with detectors trained on BCCD mse at most 0.03 %, percentile 99.99
# 0.01 %; entropy 0.3 % (rt_detr) and in a tenth of a d_fine's tensors 2 to 5 %, which costs AP.
CLIPPED = 0.01
# Spreads of the training images. The median image of their own splits is at 0.8 to 1.1 (one image at most 2.5);
# images of another kind are at: rt_detr trained on BCCD: rendered scenes 4.7, cards 6.8; d_fine on BCCD: 3.1, 5.6;
# deformable_detr on cards: rendered scenes 2.5, BCCD 4.2.
UNLIKE = 1.6
REFERENCE_IMAGES = 32  # of the training split, that others are compared with
LEAST_SPREAD = 0.02  # of a tensor's largest magnitudes, natural logarithm: an input that always reaches white has none


def moved_ranges(histograms: Mapping[str, Histogram], choose: Callable[[Histogram], float]) -> dict[str, float]:
    """{tensor: factor > MOVED by which its range differs between the halves of the images}, the largest first.

    choose   the observer. A range that is 0 in one half alone moves by infinity
    """
    found = {}
    for name, histogram in histograms.items():
        low, high = sorted(choose(half) for half in histogram.halves())
        factor = high / low if low else (float("inf") if high else 1.0)
        if factor > MOVED:
            found[name] = factor
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def clipped_tensors(histograms: Mapping[str, Histogram], amax: Mapping[str, float]) -> dict[str, float]:
    """{tensor: fraction of its values beyond its range}, for fractions above CLIPPED, the largest first.

    Counted in whole bins that lie beyond the range: a bin is 1/2048 of the largest magnitude or up to 1/1024.
    """
    found = {}
    for name, histogram in histograms.items():
        total = int(histogram.counts.sum())
        if not total or not histogram.limit:
            continue
        beyond = histogram.counts[int(np.ceil(amax[name] * BINS / histogram.limit)) :].sum()
        if beyond / total > CLIPPED:
            found[name] = float(beyond / total)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Likeness:
    """How far images are from others.

    distance   of the median image, in spreads of the others: root mean square over the tensors; 1 = one of them
    factors    {tensor: how many times larger (above 1) or smaller its largest magnitude is}, the most different first
    """

    distance: float
    factors: Mapping[str, float]

    @property
    def another_kind(self) -> bool:
        return self.distance > UNLIKE


def compare_images(images: Mapping[str, Histogram], others: Mapping[str, Histogram]) -> Likeness:
    """Compare the largest magnitude of each tensor on each image with those on the others; both have the same tensors.

    Magnitudes are compared as logarithms: an image of half the contrast is as far away as one of twice the contrast.
    """
    these, those = _log_absmax(images), _log_absmax(others)  # [T, I], [T, J]
    mean, spread = those.mean(axis=1), np.maximum(those.std(axis=1), LEAST_SPREAD)
    distances = np.sqrt((((these - mean[:, None]) / spread[:, None]) ** 2).mean(axis=0))  # [I]
    shift = these.mean(axis=1) - mean
    order = np.argsort(-np.abs(shift / spread))
    names = list(images)
    return Likeness(float(np.median(distances)), {names[index]: float(np.exp(shift[index])) for index in order})


def _log_absmax(histograms: Mapping[str, Histogram]) -> np.ndarray:
    """[T, I] natural logarithm of the largest magnitude of each tensor on each image; zero counts as 1e-12."""
    return np.log(np.maximum(np.array([one.image_absmax for one in histograms.values()]), 1e-12))
