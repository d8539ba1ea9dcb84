"""The front of placements against brute force, a greedy order and its own definition."""

from __future__ import annotations

import os
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import milp

from edgedetr.quantization.search import front as solver
from edgedetr.quantization.search.front import Choice, Edge, front, placement_cost, solve


def problem(seed: int, groups: int) -> tuple[dict[str, Choice], list[Edge]]:
    """A chain with a few skips, as in a network; one group in four is slower in INT8."""
    rng = np.random.default_rng(seed)
    names = [f"g{n}" for n in range(groups)]
    gains = -rng.exponential(1.0, groups) * np.where(rng.random(groups) < 0.25, -0.3, 1)
    choices = {name: Choice(float(gain), float(d)) for name, gain, d in zip(names, gains, rng.lognormal(0, 2, groups))}
    pairs = [(n, n + 1) for n in range(groups - 1)] + [(n, n + 3) for n in range(0, groups - 3, 4)]
    return choices, [Edge(names[a], names[b], float(rng.exponential(0.4))) for a, b in pairs]


def brute_force(choices: dict[str, Choice], edges: list[Edge], most: float) -> float:
    """The least time over all 2^G placements, straight from the formula."""
    best = np.inf
    for bits in product((0, 1), repeat=len(choices)):
        on = dict(zip(choices, bits))
        if sum(choices[name].distance for name in on if on[name]) > most:
            continue
        time = sum(choices[name].gain for name in on if on[name])
        time += sum(edge.penalty for edge in edges if on[edge.first] != on[edge.second])
        best = min(best, time)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_solution_is_as_fast_as_the_best_of_all_placements(seed):
    choices, edges = problem(seed, 9)
    total = sum(choice.distance for choice in choices.values())
    for most in (0.0, 0.02 * total, 0.2 * total, np.inf):
        found = solve(choices, edges, most)
        assert found.distance <= most * (1 + 1e-6)
        assert found.gain == pytest.approx(brute_force(choices, edges, most), abs=1e-9)


def test_along_the_front_time_falls_and_distance_rises():
    points = front(*problem(3, 40))
    assert 8 <= len(points) <= 12
    assert all(a.gain > b.gain and a.distance < b.distance for a, b in pairwise(points))
    assert points[-1].gain == solve(*problem(3, 40), np.inf).gain


def test_no_greedy_placement_of_equal_distance_is_faster_than_the_front():
    choices, edges = problem(5, 40)
    order = sorted(choices, key=lambda name: choices[name].gain / (choices[name].distance + 1e-9))
    for count in range(1, 41, 3):
        greedy = order[:count]
        most = sum(choices[name].distance for name in greedy)
        assert solve(choices, edges, most).gain <= placement_cost(greedy, choices, edges) + 1e-9


def test_a_group_between_int8_neighbors_follows_them_where_converting_costs_more_than_it_loses():
    # By hand: alone b loses 1, but in float it costs two conversions of 0.8.
    choices = {"a": Choice(-5, 1), "b": Choice(1, 0), "c": Choice(-5, 1)}
    edges = [Edge("a", "b", 0.8), Edge("b", "c", 0.8)]
    assert solve(choices, edges, np.inf).int8 == ("a", "b", "c")
    assert solve(choices, [Edge("a", "b", 0.4), Edge("b", "c", 0.4)], np.inf).int8 == ("a", "c")


def test_where_nothing_is_faster_in_int8_the_front_is_empty():
    assert front({"a": Choice(0.5, 1), "b": Choice(0.0, 1)}, []) == ()
    assert front({}, []) == ()
    assert front({"a": Choice(-1, 1)}, []) != ()


def test_a_thinned_front_leaves_no_large_gap_where_much_distance_buys_little_time():
    """Gains fall as 1, 1/2, 1/3, ... and distances rise as 1, 2, 3, ...: the last groups hold most of the distance."""
    choices = {f"g{n}": Choice(-1 / n, float(n)) for n in range(1, 25)}
    points = front(choices, [], points=8)
    assert len(points) <= 8 and len(points[-1].int8) == 24
    spans = points[-1].distance - points[0].distance, points[0].gain - points[-1].gain
    steps = [(b.distance - a.distance) / spans[0] + (a.gain - b.gain) / spans[1] for a, b in pairwise(points)]
    assert max(steps) < 2 * 2 / 7, steps  # twice an equal step; by time alone the last one took 0.69


def test_the_solver_writes_nothing_and_what_is_written_around_it_stays(capfd, monkeypatch):
    def loud(*arguments, **named):
        os.write(1, b"for the developers of HiGHS\n")
        return milp(*arguments, **named)

    monkeypatch.setattr(solver, "milp", loud)
    print("before")
    assert front(*problem(0, 12))
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
