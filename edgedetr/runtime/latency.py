"""How long an inference takes: candidates take turns in one process, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgedetr.errors import UsageError

WARM_UP = 5     # runs before the first that counts: memory is planned, caches and clocks settle


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


def measure(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 50, warm_up: int = WARM_UP,
            progress: Callable[[str, int, int], None] | None = None) -> dict[str, Latency]:
    """Latency of each candidate; in every round each runs once, in an order that moves on by one."""
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
    return {name: Latency.of(values) for name, values in seconds.items()}


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The names, starting `number` places further on: nobody always runs after the same neighbour's leftovers first."""
    start = number % max(1, len(names))
    return [*names[start:], *names[:start]]


def timed(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
