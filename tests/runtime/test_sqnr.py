"""The ratio of signal to noise, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgedetr.runtime.sqnr import sqnr_db


@pytest.mark.parametrize("noise, decibels", [(0.1, 20), (1.0, 0), (10.0, -20), (0.0, float("inf"))])
def test_decibels_by_hand(noise, decibels):
    signal = np.ones(10)
    assert sqnr_db(signal, signal + noise) == pytest.approx(decibels)


@pytest.mark.parametrize("other", [np.nan, np.inf])
def test_nan_and_infinity_are_the_worst_and_not_unknown(other):
    assert sqnr_db(np.ones(3), np.array([1, other, 1])) == float("-inf")


def test_silence_is_equal_to_itself_and_to_nothing_else():
    assert sqnr_db(np.zeros(3), np.zeros(3)) == float("inf")
    assert sqnr_db(np.zeros(3), np.ones(3)) == float("-inf")
