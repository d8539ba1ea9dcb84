"""Streaming histograms of |x| and the four ways to choose a symmetric range from one.

A histogram has a fixed number of bins over [0, limit); when a larger value arrives, neighboring bins are merged and
the limit doubles, so memory does not grow with the number of images and nothing is clipped while observing.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from edgedetr.errors import ExportError
from edgedetr.options import one_of

Observer = Literal["minmax", "percentile", "entropy", "mse"]

BINS = 2048  # after a doubling at least half of them are in use: 1,024 levels for 127 steps
LEVELS = 127  # largest int8 magnitude of a symmetric grid
PER_IMAGE = 65536  # values of one tensor that one image adds to the histogram; extremes are always exact
CANDIDATES = 100  # ranges tried by "mse" and "entropy", evenly from 1/CANDIDATES of the largest value to all


class Histogram:
    """Distribution of the magnitudes of one tensor, image after image.

    counts  [BINS]  int64, magnitudes in [i, i + 1) * limit / BINS
    zeros           how many of counts[0] are exactly 0
    limit           upper end, a power of two times the first image's largest value
    largest         exact largest magnitude seen
    peaks           the largest magnitude of each image, in order
    """

    def __init__(self, name: str, per_image: int | None = PER_IMAGE) -> None:
        self.name, self.per_image = name, per_image
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.zeros = 0
        self.limit, self.largest, self.lowest = 0.0, 0.0, 0.0
        self.peaks: list[float] = []

    def observe(self, values: np.ndarray) -> None:
        """Add the values of one image, any shape; NaN or infinity is an ExportError that names the tensor."""
        if values.size == 0:
            self.peaks.append(0.0)
            return
        flat = values.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ExportError(
                f"tensor {self.name!r} holds NaN or infinity on a calibration image; expected finite "
                f"activations; check the weights with: edgedetr inspect BUNDLE"
            )
        peak = max(-low, high)
        self.peaks.append(peak)
        self.largest, self.lowest = max(self.largest, peak), min(self.lowest, low)
        if self.per_image is not None and flat.size > self.per_image:
            flat = flat[:: _stride(flat.size, self.per_image)]
        self.zeros += flat.size - int(np.count_nonzero(flat))
        self._reach(peak)
        if self.limit == 0.0:
            self.counts[0] += flat.size
            return
        place = (np.abs(flat) * np.float32(BINS / self.limit)).astype(np.int32)
        self.counts += np.bincount(np.minimum(place, BINS - 1), minlength=BINS)

    def _reach(self, peak: float) -> None:
        if self.limit == 0.0:
            self.limit = peak
            return
        while peak > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, dtype=np.int64)])
            self.limit *= 2

    @property
    def centers(self) -> np.ndarray:
        """[BINS] float64, the magnitude each bin stands for."""
        return (np.arange(BINS) + 0.5) * (self.limit / BINS)

    def amax(self, observer: Observer, percentile: float = 99.99) -> float:
        """Largest magnitude that the int8 grid should represent; 0 for a tensor that was always 0."""
        one_of("quant.observer", observer, get_args(Observer))
        if self.largest == 0.0:
            return 0.0
        if observer == "minmax":
            return self.largest
        if observer == "percentile":
            return min(_percentile(self.counts, percentile) * self.limit / BINS, self.largest)
        trials = np.linspace(self.largest / CANDIDATES, self.largest, CANDIDATES)
        if observer == "mse":
            losses = [squared_error(self.centers, self.counts, trial) for trial in trials]
        else:  # "entropy"
            counts = self._without_zeros()
            if not counts.any():  # the few values that are not 0 fell between those that were counted
                return self.largest
            losses = [divergence(counts, round(trial * BINS / self.limit)) for trial in trials]
        return float(trials[int(np.argmin(losses))])

    def _without_zeros(self) -> np.ndarray:
        """[BINS] counts for entropy, which has to leave exact zeros out (Migacz 2017).

        Every grid represents 0, so zeros say nothing about the range; but a ReLU gives so many that all the divergence
        is that of bin 0 spread over its level, and the smallest level, which is the smallest range, always wins.
        """
        counts = self.counts.copy()
        counts[0] -= self.zeros
        return counts


def _stride(size: int, wanted: int) -> int:
    """Smallest step >= size / wanted that shares no factor with size, so that no row or channel is favored."""
    step = -(-size // wanted)
    while np.gcd(step, size) > 1:
        step += 1
    return step


def _percentile(counts: np.ndarray, percentile: float) -> float:
    """Position (in bins, fractional) below which `percentile` per cent of the counts lie."""
    total = np.cumsum(counts)
    target = total[-1] * percentile / 100
    index = int(np.searchsorted(total, target))
    before = total[index - 1] if index else 0
    return index + float(target - before) / max(int(counts[index]), 1)


def squared_error(centers: np.ndarray, counts: np.ndarray, amax: float) -> float:
    """Summed squared error of magnitudes rounded to the grid amax / 127 and clipped to amax."""
    step = amax / LEVELS
    rounded = np.clip(np.round(centers / step), 0, LEVELS) * step
    return float((counts * (rounded - centers) ** 2).sum())


def divergence(counts: np.ndarray, keep: int) -> float:
    """Kullback-Leibler divergence between the first `keep` bins (the rest clipped into the last) and their 128 levels.

    The clipped mass counts in the reference and not in the quantized one, which is what makes clipping cost something
    (Migacz 2017, "8-bit inference with TensorRT").
    """
    levels = LEVELS + 1
    if keep < levels:
        return float("inf")
    inside = counts[:keep].astype(np.float64)
    reference = inside.copy()
    reference[-1] += counts[keep:].sum()
    group = np.arange(keep) * levels // keep
    used = reference > 0
    mass = np.bincount(group, weights=inside, minlength=levels)
    members = np.bincount(group, weights=used, minlength=levels)
    spread = np.where(used, (mass / np.maximum(members, 1))[group], 0.0)
    if spread.sum() == 0:
        return float("inf")
    p, q = reference[used] / reference.sum(), spread[used] / spread.sum()
    # A bin whose whole level holds only clipped mass has q = 0; the floor makes it expensive instead of infinite.
    return float((p * np.log(p / np.maximum(q, 1e-12))).sum())
