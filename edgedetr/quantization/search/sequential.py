"""Sequential verification: which of several graphs, ordered by risk, provably lose at most a budget of AP.

One run of `certify` accepts a graph whose true drop exceeds the budget with a probability of at most ALPHA, whatever
the number of graphs and looks. Three rules give that:

- Looks at one graph. It is judged at a growing number of images. The level of each look is the increment of the
  O'Brien-Fleming-like spending function of Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials",
  alpha(t) = 2 - 2 Phi(z(1 - alpha / 2) / sqrt(t)). Early looks need overwhelming evidence, so that the last one keeps
  almost the whole level. The looks' levels sum to alpha (a union bound; that the looks share images is not used).
- Graphs in order of risk, the safest first, each at the full level, until the first that is not accepted (a fixed
  sequence: Maurer, Hothorn and Lehmacher 1995; Wiens 2003, "A fixed sequence Bonferroni procedure"). Whichever graph
  is the first in this order that exceeds the budget, nothing beyond it is accepted unless it is, which has a
  probability of at most alpha. Order and start must be fixed before an image of this set was seen.
- The sequence begins at the graph where the search expects the budget to hold. Where that graph fails, what is left of
  ALPHA goes to a second sequence, from the safest graph up to the one before it (a union bound over the two).

The bound of one look is that of a paired bootstrap (evaluation/bootstrap.py). A look is also the end for a graph that
the remaining images cannot save; that only ever rejects, so it costs no level.

The levels are as good as the bootstrap. In simulations at the budget's edge, a bound of nominally 5 % misses 4 % of the
time where rounding moves scores and boxes a little, as INT8 does. Where the whole loss is a handful of lost objects, it
misses 10 % with 128 images and 4 % with 400: few images cannot show what happens in one of a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

ALPHA = 0.05  # of the whole search: P(the accepted graph's true drop exceeds the budget)
FIRST_SHARE = 0.8  # of ALPHA, for the sequence that begins at the expected graph; the rest for the second one
FRACTIONS = (0.25, 0.5, 1.0)  # of the images, at which a graph is judged
FEWEST_IMAGES = 64  # a look at fewer is left out: the bootstrap of AP is not trusted below
FEWEST_BEYOND = 10  # resamples beyond a percentile; with fewer the normal bound alone is taken
Z95 = NormalDist().inv_cdf(0.95)

Outcome = Literal["accepted", "rejected", "open"]


@dataclass(frozen=True)
class Look:
    """A number of images, and the one-sided level that is spent there."""

    images: int
    level: float


@dataclass(frozen=True)
class LookResult:
    """What one look at one graph gave; drops and bounds in points.

    candidate   position in the order of risk
    images      so many of the images
    level       one-sided level of `upper`
    drop        AP lost on these images
    se          standard error of the drop
    upper       bound of the drop at `level`
    lower       one-sided 95 % lower bound of the drop
    """

    candidate: int
    images: int
    level: float
    drop: float
    se: float
    upper: float
    lower: float
    outcome: Outcome


@dataclass(frozen=True)
class Certification:
    """accepted      position of the riskiest accepted graph; None = none was accepted
    looks         every look, in order
    certifiable   the smallest budget that would have been certified, points: the least bound of all looks
    """

    accepted: int | None
    looks: tuple[LookResult, ...]
    certifiable: float


def planned_looks(images: int, alpha: float, fractions: Sequence[float] = FRACTIONS) -> tuple[Look, ...]:
    """The looks at one graph; their levels sum to alpha, and the last one has all images."""
    z = NormalDist().inv_cdf(1 - alpha / 2)
    counts = sorted({round(fraction * images) for fraction in fractions} | {images})
    spent, looks = 0.0, []
    for count in counts:
        if count < min(FEWEST_IMAGES, images):
            continue
        total = alpha if count == images else 2 - 2 * NormalDist().cdf(z / sqrt(count / images))
        looks.append(Look(count, total - spent))
        spent = total
    return tuple(looks)


def upper_bound(drops: np.ndarray, level: float) -> float:
    """One-sided upper bound of a drop: the larger of the percentile bound and drop + z se, widened for skewness.

    drops   [1 + R] points, the drop on the images as they are, then on every resample

    Where few images carry the loss, a sample that has too few of them shows a small drop and a small error too. The
    term in z^2 is Hall's (1992, "On the removal of skewness by transformation"); it only ever widens. The percentile is
    left out where fewer than FEWEST_BEYOND resamples lie beyond it.
    """
    resampled = _finite(drops)
    if not resampled.size or not np.isfinite(drops[0]):
        return 100.0  # no usable resample: the widest bound
    z, se = NormalDist().inv_cdf(1 - level), float(resampled.std())
    skewness = float(((resampled - resampled.mean()) ** 3).mean()) / se**3 if se > 0 else 0.0
    bound = float(drops[0]) + se * (z + max(0.0, skewness) * (2 * z * z + 1) / 6)
    if level * len(resampled) >= FEWEST_BEYOND:
        bound = max(bound, float(np.quantile(resampled, 1 - level)))
    return bound


def margin_at_the_end(se: float, images: int, total: int, alpha: float = ALPHA * FIRST_SHARE) -> float:
    """How far above the drop the last look's bound lies, points, if the standard error was `se` at `images`.

    A graph that loses nothing is certified to a budget of this size, and not to a smaller one.
    """
    level = planned_looks(total, alpha)[-1].level
    return NormalDist().inv_cdf(1 - level) * se * sqrt(images / total)


def certify(
    candidates: int,
    start: int,
    budget: float,
    drops: Callable[[int, int], np.ndarray],
    images: int,
    *,
    alpha: float = ALPHA,
    seen: Callable[[LookResult], None] | None = None,
) -> Certification:
    """Judge graphs 0 .. candidates - 1, the safest first, beginning at `start`; see the head of this file.

    drops    (candidate, n) -> [1 + R] drops in points on the first n images: as they are, then on every resample
    images   the number of images
    seen     called with every look
    """
    if not 0 <= start < candidates:
        raise ValueError(f"start is {start}; expected 0 to {candidates - 1}")
    looks: list[LookResult] = []

    def accepted(candidate: int, share: float) -> bool:
        for look in planned_looks(images, alpha * share):
            result = judge_look(candidate, look, drops(candidate, look.images), budget, images)
            looks.append(result)
            if seen is not None:
                seen(result)
            if result.outcome != "open":
                return result.outcome == "accepted"
        return False

    best = _last_accepted(range(start, candidates), lambda candidate: accepted(candidate, FIRST_SHARE))
    if best is None:
        best = _last_accepted(range(start), lambda candidate: accepted(candidate, 1 - FIRST_SHARE))
    if best is None and not any(look.images == images and look.candidate == 0 for look in looks):
        # Nothing can be accepted any more; the safest on all images tells what could be certified.
        last = planned_looks(images, alpha * (FIRST_SHARE if start == 0 else 1 - FIRST_SHARE))[-1]
        looks.append(replace(judge_look(0, last, drops(0, images), budget, images), outcome="rejected"))
        if seen is not None:
            seen(looks[-1])
    return Certification(best, tuple(looks), min(look.upper for look in looks))


def judge_look(candidate: int, look: Look, drops: np.ndarray, budget: float, images: int) -> LookResult:
    """One look: accepted where the bound is within the budget, rejected where it cannot get there any more."""
    resampled = _finite(drops)
    drop = float(drops[0]) if np.isfinite(drops[0]) else 100.0
    se = float(resampled.std()) if resampled.size else 100.0
    upper, lower = upper_bound(drops, look.level), drop - Z95 * se
    outcome: Outcome = "open"
    if upper <= budget:
        outcome = "accepted"
    elif look.images == images or lower + margin_at_the_end(se, look.images, images) > budget:
        outcome = "rejected"
    return LookResult(candidate, look.images, look.level, drop, se, upper, lower, outcome)


def _last_accepted(order: range, accepted: Callable[[int], bool]) -> int | None:
    best = None
    for candidate in order:
        if not accepted(candidate):
            break
        best = candidate
    return best


def _finite(drops: np.ndarray) -> np.ndarray:
    return drops[1:][np.isfinite(drops[1:])]
