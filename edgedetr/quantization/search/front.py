"""The Pareto front of placements: for every risk that is allowed, the set of INT8 groups with the least time.

    min  sum_g c_g o_g + sum_(g,h) r_gh |o_g - o_h|     subject to  sum_g d_g o_g <= D,   o_g in {0, 1}

with c_g the time that group g gains or loses in INT8, r_gh >= 0 the time of converting a tensor between two groups of
unequal precision, d_g the distance that g alone in INT8 adds to the detections. Solved exactly as a mixed-integer
program by HiGHS (Huangfu and Hall 2018), with one continuous variable per edge for the absolute value.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from edgedetr.errors import ExportError

POINTS = 10  # at most, on one front
SECONDS = 30.0  # at most, for one point; a front of 200 groups takes a second
# Relative to the largest value: the solver's own tolerance on constraints, so that a set which just fits is not lost.
SLACK = 1e-9


@dataclass(frozen=True)
class Choice:
    """One group as the solver sees it.

    gain       time in INT8 minus time in float, any unit; negative = INT8 is faster
    distance   what the group alone in INT8 adds to the distance of the detections, at least 0
    """

    gain: float
    distance: float


@dataclass(frozen=True)
class Edge:
    """Two groups, and the time of converting between them where their precision differs, at least 0."""

    first: str
    second: str
    penalty: float


@dataclass(frozen=True)
class FrontPoint:
    """A placement on the front.

    int8       ids of the groups in INT8, in the order of the groups
    gain       predicted time relative to all-float, in the unit of the choices
    distance   predicted distance: the sum over the groups
    """

    int8: tuple[str, ...]
    gain: float
    distance: float


def solve(choices: Mapping[str, Choice], edges: Sequence[Edge], most: float) -> FrontPoint:
    """The placement with the least time whose distances sum to at most `most`. Errors: ExportError."""
    names = list(choices)
    index = {name: number for number, name in enumerate(names)}
    gains = np.array([choice.gain for choice in choices.values()], dtype=float)
    distances = np.array([choice.distance for choice in choices.values()], dtype=float)
    _check(gains, distances, edges, index)
    kept = [edge for edge in edges if edge.penalty > 0 and edge.first != edge.second]
    cost = np.concatenate([gains, [edge.penalty for edge in kept]])
    scale = max(float(np.abs(cost).max(initial=0)), 1e-12)
    constraints = _differences(kept, index, len(names))
    if np.isfinite(most):
        size = max(float(distances.max(initial=0)), 1e-12)
        row = np.concatenate([distances / size, np.zeros(len(kept))])
        constraints.append(LinearConstraint(row[None], -np.inf, most / size + SLACK))
    with _silent():
        result = milp(
            cost / scale,
            integrality=np.concatenate([np.ones(len(names)), np.zeros(len(kept))]),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": SECONDS, "mip_rel_gap": 0},
        )
    if result.x is None:
        raise ExportError(f"the placement could not be solved: {result.message}; this is a fault of edgedetr")
    chosen = result.x[: len(names)] > 0.5
    return _point(names, chosen, choices, edges)


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes lines for its own developers to standard output, whatever its options say."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def front(choices: Mapping[str, Choice], edges: Sequence[Edge], points: int = POINTS) -> tuple[FrontPoint, ...]:
    """At most `points` placements from the safest to the fastest: distance rises and time falls from one to the next.

    The last is the fastest of all, whatever its distance. Empty where no placement is faster than all-float.
    """
    if not choices:
        return ()
    fastest = solve(choices, edges, np.inf)
    if not fastest.int8 or fastest.gain >= 0:
        return ()
    # The fastest may hold groups that gain nothing; the least distance at its time is what matters.
    found = {fastest.int8: fastest}
    used = [choices[name].distance for name in fastest.int8 if choices[name].distance > 0]
    if used and points > 1:
        # Equal steps of the logarithm: distances span orders of magnitude, and small budgets are of interest too.
        for most in np.geomspace(min(used), sum(used), 3 * points)[:-1]:
            point = solve(choices, edges, float(most))
            found[point.int8] = point
    return _thinned(_undominated(list(found.values())), points)


def _undominated(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Those that are faster than everything with less distance, the least distance first; all-float is left out."""
    kept: list[FrontPoint] = []
    best = 0.0
    for point in sorted(points, key=lambda point: (point.distance, point.gain)):
        if point.int8 and point.gain < best:
            kept.append(point)
            best = point.gain
    return kept


def _thinned(points: Sequence[FrontPoint], most: int) -> tuple[FrontPoint, ...]:
    """At most `most` of them with the first and the last, at steps as equal as possible along the front.

    A step counts time and distance alike, each as a share of what the front spans: near the fastest point much
    distance is spent on little time, and there budgets of tenths of a point are decided.
    """
    if len(points) <= most:
        return tuple(points)
    values = np.array([(point.gain, point.distance) for point in points])
    steps = np.abs(np.diff(values, axis=0)) / np.maximum(np.ptp(values, axis=0), 1e-12)
    along = np.concatenate([[0.0], steps.sum(axis=1).cumsum()])
    chosen = sorted({int(np.abs(along - value).argmin()) for value in np.linspace(0.0, along[-1], most)})
    return tuple(points[number] for number in chosen)


def placement_cost(int8: Sequence[str], choices: Mapping[str, Choice], edges: Sequence[Edge]) -> float:
    """Time of a placement relative to all-float, as the model predicts it."""
    chosen = set(int8)
    differing = sum(edge.penalty for edge in edges if (edge.first in chosen) != (edge.second in chosen))
    return sum(choices[name].gain for name in chosen) + differing


def _point(
    names: Sequence[str], chosen: np.ndarray, choices: Mapping[str, Choice], edges: Sequence[Edge]
) -> FrontPoint:
    int8 = tuple(name for name, one in zip(names, chosen) if one)
    return FrontPoint(int8, placement_cost(int8, choices, edges), sum(choices[name].distance for name in int8))


def _differences(edges: Sequence[Edge], index: Mapping[str, int], groups: int) -> list[LinearConstraint]:
    """o_g - o_h - e <= 0 and o_h - o_g - e <= 0 for every edge: its variable e is at least |o_g - o_h|."""
    if not edges:
        return []
    rows, columns, values = [], [], []
    for number, edge in enumerate(edges):
        for row, sign in ((2 * number, 1), (2 * number + 1, -1)):
            rows += [row, row, row]
            columns += [index[edge.first], index[edge.second], groups + number]
            values += [sign, -sign, -1]
    matrix = csr_matrix((values, (rows, columns)), shape=(2 * len(edges), groups + len(edges)))
    return [LinearConstraint(matrix, -np.inf, 0)]


def _check(gains: np.ndarray, distances: np.ndarray, edges: Sequence[Edge], index: Mapping[str, int]) -> None:
    """Errors: ValueError; these values come from our own measurements."""
    if not (np.isfinite(gains).all() and np.isfinite(distances).all() and (distances >= 0).all()):
        raise ValueError("gains and distances must be finite, distances at least 0")
    for edge in edges:
        if edge.penalty < 0 or edge.first not in index or edge.second not in index:
            raise ValueError(f"{edge} has a negative penalty, or names an unknown group")
