"""Timing: candidates alternate fairly and percentiles are numpy's."""

from __future__ import annotations

import time

import numpy as np
import pytest

from edgedetr.errors import UsageError
from edgedetr.runtime.latency import Latency, measure, rotated, warn_if_unsteady


def test_candidates_take_turns_and_each_leads_equally_often():
    calls: list[str] = []
    steps: list[tuple[str, int, int]] = []
    timings = measure(
        {name: (lambda name=name: calls.append(name)) for name in "abc"},
        rounds=6,
        warm_up=2,
        progress=lambda *step: steps.append(step),
    )
    assert calls[:6] == list("aabbcc")
    rounds = [calls[6 + 3 * n : 9 + 3 * n] for n in range(6)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert [r[0] for r in rounds] == list("abcabc")
    assert {t.runs for t in timings.values()} == {6}
    assert steps[-1] == ("bench", 6, 6)


def test_slow_is_slower_and_in_milliseconds():
    timings = measure({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=3, warm_up=0)
    assert 20 <= timings["slow"].p50_ms < 20_000  # sleep is never shorter than asked; seconds would be 0.02
    assert timings["fast"].p50_ms < timings["slow"].p50_ms


def test_percentiles_are_of_the_runs():
    latency = Latency.of(np.arange(1, 102) / 1000)
    assert (latency.p50_ms, latency.p99_ms, latency.runs) == (pytest.approx(51), pytest.approx(100), 101)


@pytest.mark.parametrize("change, said", [(1.0, ""), (1.2, ""), (1.6, "slower"), (0.5, "faster")])
def test_a_machine_that_changes_its_pace_is_said(change, said, caplog, rng):
    pace = np.linspace(1, change, 60)
    seconds = {name: list(pace * base * rng.uniform(0.95, 1.05, 60)) for name, base in (("a", 0.01), ("b", 0.03))}
    assert warn_if_unsteady(seconds) == bool(said)
    assert (f"the machine became {said}" in caplog.text) if said else not caplog.text


def test_one_candidate_alone_or_a_few_runs_say_nothing_of_the_machine(caplog):
    assert not warn_if_unsteady({"a": [1.0] * 30 + [9.0] * 30, "b": [1.0] * 60, "c": [2.0] * 60})
    assert not warn_if_unsteady({"a": [1.0, 9.0]})
    assert not warn_if_unsteady({})
    assert not caplog.text


def test_no_rounds_is_a_usage_error():
    with pytest.raises(UsageError, match="rounds is 0"):
        measure({}, rounds=0)


def test_rotation_starts_further_on():
    assert rotated("abc", 4) == ["b", "c", "a"]
    assert rotated([], 4) == []
