"""Measure latency: candidates run alternately in one process, so that disturbances affect all of them equally."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edgedetr.errors import UsageError
from edgedetr.progress import Progress

T = TypeVar("T")

log = logging.getLogger(__name__)

UNSTEADY = 1.3  # a run's last third over its first: a board that throttles loses a third of its clock and more
FEW_RUNS = 12  # with fewer runs, a third is too short
WARM_UP = 5  # runs before the first timed one: memory is planned, caches and clocks settle


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: median and 99th percentile over `runs` of them."""

    p50_ms: float
    p99_ms: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        p50, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
        return cls(float(p50), float(p99), len(seconds))


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warm_up: int = WARM_UP,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Latency of each candidate; in every round each runs once, in an order that is rotated by one."""
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; expected at least 1")
    names = list(candidates)
    for name in names:
        for _ in range(warm_up):
            candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in rotated(names, number):
            seconds[name].append(timed(candidates[name]))
        if progress:
            progress("bench", number + 1, rounds)
    warn_if_unsteady(seconds)
    return {name: Latency.of(values) for name, values in seconds.items()}


def error_of_median(values: np.ndarray) -> float:
    """Standard error of the median, from the median absolute deviation (both are robust against a disturbed run)."""
    if not len(values):
        return float("inf")
    deviation = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    return 1.2533 * deviation / float(np.sqrt(len(values)))


def drift(seconds: Sequence[float]) -> float:
    """Median of the last third over the median of the first: 1 on a steady machine, more where it slows down."""
    third = max(1, len(seconds) // 3)
    return float(np.median(seconds[-third:]) / np.median(seconds[:third]))


def warn_if_unsteady(seconds: Mapping[str, Sequence[float]]) -> bool:
    """Warn, and return True, where all candidates together became slower or faster while they were timed.

    They run alternately, so a change of all of them is a change of the machine: a throttled clock, or other work.
    """
    drifts = [drift(values) for values in seconds.values() if len(values) >= FEW_RUNS]
    if not drifts or 1 / UNSTEADY < (change := float(np.median(drifts))) < UNSTEADY:
        return False
    log.warning(
        "the machine became %s while latencies were measured (the last third took %.1f times as long as the "
        "first), so they cannot be compared: look for other processes and for throttling (heat, power mode), "
        "then measure again",
        "slower" if change > 1 else "faster",
        change,
    )
    return True


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The items, starting `number` positions later, so that none always runs after the same neighbor."""
    start = number % max(1, len(items))
    return [*items[start:], *items[:start]]


def timed(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
