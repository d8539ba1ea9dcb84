"""Rank correlation: whether two measurements put the same things in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_correlation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's; None where one of them has no order."""
    a, b = (_ranks(np.asarray(values, dtype=float)) for values in (one, other))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def split_half_correlation(distances: np.ndarray) -> float | None:
    """Rank correlation between the groups' means on two halves of the images, every second one.

    distances   [groups, images]
    return      None for fewer than 3 groups or 2 images, and where a half has no order
    """
    if distances.shape[0] < 3 or distances.shape[1] < 2:
        return None
    first, second = (distances[:, start::2].mean(axis=1) for start in (0, 1))
    return rank_correlation(first, second)


def _ranks(values: np.ndarray) -> np.ndarray:
    """[N] positions in ascending order; equal values share the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index.reshape(-1)]
