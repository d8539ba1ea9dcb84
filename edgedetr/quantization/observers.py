"""Observers: streaming histograms of |x|, and the rules that choose a symmetric INT8 range (amax) from one.

A histogram has a fixed number of bins over [0, limit). When a larger value arrives, neighboring bins are merged and the
limit doubles, so memory does not grow with the number of images, and nothing is clipped while observing.

To add an observer: write its function (Histogram, option) -> amax, and add one record to OBSERVERS. The words that
`quant.observer` accepts, its check and its messages follow from that table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgedetr.errors import ExportError
from edgedetr.options import one_of
from edgedetr.printable import shown

BINS = 2048  # after a doubling at least half of them are in use: 1,024 levels for 127 steps
LEVELS = 127  # largest int8 magnitude of a symmetric grid
PER_IMAGE = 65536  # values of one tensor that one image adds to the histogram; extremes are always exact
# Of a tensor's values, by "entropy". In detectors trained on BCCD it clips up to 0.3 % (rt_detr) and 5 % (d_fine).
MOST_CLIPPED = 0.1
CANDIDATES = 100  # ranges tried by "mse" and "entropy", evenly from 1/CANDIDATES of the largest value to all


class Histogram:
    """Distribution of the magnitudes of one tensor, image after image.

    counts          [BINS]  int64, magnitudes in [i, i + 1) * limit / BINS
    odd_counts      [BINS]  those of every second image alone: the second, fourth, ...
    zeros           how many of counts[0] are exactly 0; odd_zeros: of odd_counts[0]
    limit           upper end, a power of two times the first image's largest value
    largest         exact largest magnitude over all images
    image_absmax    the largest magnitude of each image, in order
    """

    def __init__(self, name: str, per_image: int | None = PER_IMAGE) -> None:
        self.name, self.per_image = name, per_image
        self.counts, self.odd_counts = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
        self.zeros, self.odd_zeros = 0, 0
        self.limit, self.largest = 0.0, 0.0
        self.image_absmax: list[float] = []

    def observe(self, values: np.ndarray, image: str = "a calibration image") -> None:
        """Add the values of one image, any shape.

        image   for the message. Errors: ExportError for NaN or infinity that names the tensor and the image.
        """
        if values.size == 0:
            self.image_absmax.append(0.0)
            return
        flat = values.reshape(-1)
        self.observe_sample(
            float(flat.min()), float(flat.max()), flat[:: sample_step(flat.size, self.per_image)], image
        )

    def observe_sample(self, low: float, high: float, sample: np.ndarray, image: str = "a calibration image") -> None:
        """As `observe`, for a tensor of which only a part is here.

        low, high   its smallest and largest value; NaN where it holds NaN
        sample      [N] every `sample_step`-th of its values
        """
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ExportError(
                f"tensor {self.name!r} holds NaN or infinity on {image}; expected finite "
                f"activations; check the weights with: edgedetr inspect BUNDLE"
            )
        absmax = max(-low, high)
        self.image_absmax.append(absmax)
        self.largest = max(self.largest, absmax)
        self._extend(absmax)
        self._add(self._counted(sample), sample.size - int(np.count_nonzero(sample)))

    def _counted(self, flat: np.ndarray) -> np.ndarray:
        """[BINS] how many of the values are in each bin."""
        if self.limit == 0.0:
            return np.bincount([0], weights=[flat.size], minlength=BINS).astype(np.int64)
        index = (np.abs(flat) * np.float32(BINS / self.limit)).astype(np.int32)
        return np.bincount(np.minimum(index, BINS - 1), minlength=BINS)

    def _add(self, counts: np.ndarray, zeros: int) -> None:
        self.counts += counts
        self.zeros += zeros
        if len(self.image_absmax) % 2 == 0:
            self.odd_counts += counts
            self.odd_zeros += zeros

    def _extend(self, absmax: float) -> None:
        """Double the limit until it covers `absmax`."""
        if self.limit == 0.0:
            self.limit = absmax
            return
        while absmax > self.limit:
            self.counts, self.odd_counts = _with_wider_bins(self.counts), _with_wider_bins(self.odd_counts)
            self.limit *= 2

    def halves(self) -> tuple[Histogram, Histogram]:
        """The distributions over the first, third, ... image and over the second, fourth, ..., in the same bins."""
        even, odd = Histogram(self.name), Histogram(self.name)
        even.counts, odd.counts = self.counts - self.odd_counts, self.odd_counts
        even.zeros, odd.zeros = self.zeros - self.odd_zeros, self.odd_zeros
        for start, half in enumerate((even, odd)):
            half.limit = self.limit
            half.image_absmax = self.image_absmax[start::2]
            half.largest = max(half.image_absmax, default=0.0)
        return even, odd

    @property
    def centers(self) -> np.ndarray:
        """[BINS] float64, the magnitude in the middle of each bin."""
        return (np.arange(BINS) + 0.5) * (self.limit / BINS)

    def counts_without_zeros(self) -> np.ndarray:
        """[BINS] counts without the exact zeros, which "entropy" must leave out (Migacz 2017).

        Every grid represents 0, so zeros carry no information about the range. After a ReLU there are so many that the
        divergence of bin 0, spread over its level, dominates, and the smallest range always wins.
        """
        counts = self.counts.copy()
        counts[0] -= self.zeros
        return counts

    def amax(self, observer: str, option: float | None = None) -> float:
        """Largest magnitude that the int8 grid should represent; 0 for a tensor that was always 0.

        observer   a name in OBSERVERS
        option     the value of the observer's option, for an observer that has one
        """
        one_of("quant.observer", observer, OBSERVERS)
        return 0.0 if self.largest == 0.0 else OBSERVERS[observer].choose(self, option)


def _with_wider_bins(counts: np.ndarray) -> np.ndarray:
    """[BINS] the same counts in bins of twice the width."""
    return np.concatenate([counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, dtype=np.int64)])


def minmax(histogram: Histogram, option: float | None = None) -> float:
    return histogram.largest


def percentile(histogram: Histogram, option: float | None = None) -> float:
    """The magnitude below which `option` per cent of the counted values lie."""
    if option is None:
        raise ExportError("observer 'percentile' was called without its percentile; expected 50 to 100")
    total = np.cumsum(histogram.counts)
    target = total[-1] * option / 100
    index = int(np.searchsorted(total, target))
    before = total[index - 1] if index else 0
    bins = index + float(target - before) / max(int(histogram.counts[index]), 1)
    return min(bins * histogram.limit / BINS, histogram.largest)


def entropy(histogram: Histogram, option: float | None = None) -> float:
    """The range whose quantized distribution has the smallest Kullback-Leibler divergence from the observed one.

    Ranges that clip more than MOST_CLIPPED of the values are not tried: where nearly all values are clipped into the
    last bin, the two distributions are equal, though the range holds nothing. Bright images have such values.
    """
    counts = histogram.counts_without_zeros()
    if not counts.any():  # the few values that are not 0 fell between those that were counted
        return histogram.largest
    allowed = MOST_CLIPPED * int(histogram.counts.sum())

    def loss(amax: float) -> float:
        keep = round(amax * BINS / histogram.limit)
        return divergence(counts, keep) if histogram.counts[keep:].sum() <= allowed else float("inf")

    return _smallest_loss(histogram, loss)


def mse(histogram: Histogram, option: float | None = None) -> float:
    """The range with the smallest squared error of rounding and clipping."""
    return _smallest_loss(histogram, partial(squared_error, histogram.centers, histogram.counts))


@dataclass(frozen=True)
class Observer:
    """choose    (histogram, value of the option) -> amax; the histogram holds at least one value that is not 0
    summary   one line for the documentation
    option    the field of QuantConfig that is passed to `choose`; None = it takes none
    """

    choose: Callable[[Histogram, float | None], float]
    summary: str
    option: str | None = None


OBSERVERS: Mapping[str, Observer] = {
    "minmax": Observer(minmax, "the largest magnitude seen"),
    "percentile": Observer(percentile, "quant.percentile per cent of the magnitudes are inside", option="percentile"),
    "entropy": Observer(entropy, "smallest Kullback-Leibler divergence between float and INT8 values (Migacz 2017)"),
    "mse": Observer(mse, "smallest mean squared error between float and INT8 values"),
}

LEARNED = "qat"  # in place of an observer: the ranges that quantization-aware training left in the bundle
OBSERVER_NAMES = (*OBSERVERS, LEARNED)  # values of quant.observer


def observer_of(label: str) -> tuple[str, float | None]:
    """Name and option of an observer from its label, as ranges.json and placements write it: "percentile 99.9".

    Errors: ExportError for a label that no observer has.
    """
    name, _, option = label.partition(" ")
    try:
        value = float(option) if option else None
    except ValueError:
        value = None
    known = OBSERVERS.get(name)
    if known is None or (known.option is None) != (option == "") or (option and value is None):
        labels = [word if one.option is None else f"{word} NUMBER" for word, one in OBSERVERS.items()]
        raise ExportError(f"no observer {shown(label)}; expected one of {', '.join(labels)}")
    return name, value


def _smallest_loss(histogram: Histogram, loss: Callable[[float], float]) -> float:
    """The candidate range with the smallest loss."""
    candidates = np.linspace(histogram.largest / CANDIDATES, histogram.largest, CANDIDATES)
    return float(candidates[int(np.argmin([loss(candidate) for candidate in candidates]))])


def sample_step(size: int, wanted: int | None = PER_IMAGE) -> int:
    """Smallest step >= size / wanted that shares no factor with size, so that no row or channel is favored; 1 for few.

    size     of a tensor
    wanted   values of it to count; None = all
    """
    if wanted is None or size <= wanted:
        return 1
    step = -(-size // wanted)
    while np.gcd(step, size) > 1:
        step += 1
    return step


def squared_error(centers: np.ndarray, counts: np.ndarray, amax: float) -> float:
    """Summed squared error of magnitudes rounded to the grid amax / 127 and clipped to amax."""
    step = amax / LEVELS
    rounded = np.clip(np.round(centers / step), 0, LEVELS) * step
    return float((counts * (rounded - centers) ** 2).sum())


def divergence(counts: np.ndarray, keep: int) -> float:
    """Kullback-Leibler divergence between the first `keep` bins (the rest clipped into the last) and their 128 levels.

    The clipped mass counts in the reference distribution and not in the quantized one; that makes clipping cost
    something (Migacz 2017, "8-bit inference with TensorRT").
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
