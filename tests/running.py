"""Images for an engine, and when two answers are equal."""

from __future__ import annotations

import numpy as np


def pictures(rng, n=1):
    return rng.integers(0, 256, (n, 3, 32, 48)).astype(np.float32)


def agree(raw, oracle):
    # the fake computes with the same library on the same bytes: nothing may differ
    np.testing.assert_array_equal(raw.logits, oracle.logits)
    np.testing.assert_array_equal(raw.boxes, oracle.boxes)
