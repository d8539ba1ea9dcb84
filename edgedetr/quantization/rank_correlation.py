"""Rank correlation: whether two measurements put the same things in the same order."""

from __future__ import annotations

import numpy as np


def split_half_correlation(distances: np.ndarray) -> float | None:
    """Spearman's rank correlation between the groups' means on two halves of the images, every second one.

    distances   [groups, images]
    return      None for fewer than 3 groups or 2 images, and where a half has no order
    """
    if distances.shape[0] < 3 or distances.shape[1] < 2:
        return None
    first, second = (_ranks(distances[:, start::2].mean(axis=1)) for start in (0, 1))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - counts + ends - 1) / 2)[inverse.reshape(-1)] if len(unique) else values
