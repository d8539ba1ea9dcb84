"""Signal-to-quantization-noise ratio: how far the outputs of two runs of one model are from each other."""

from __future__ import annotations

import numpy as np


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """10 log10 of the reference's power over the difference's, decibels; both arrays have one shape, any.

    inf where they are equal; -inf where the difference is NaN or infinite, or the reference is all zeros.
    """
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    noise, signal = float(((reference - other) ** 2).mean()), float((reference**2).mean())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 and np.isfinite(noise) else float("-inf")
