"""Images for an engine, and the comparison of its outputs."""

from __future__ import annotations

import numpy as np


def random_images(rng, n=1):
    return rng.integers(0, 256, (n, 3, 32, 48)).astype(np.float32)


def assert_equal_outputs(raw, reference):
    # the fake computes with the same library on the same bytes: nothing may differ
    np.testing.assert_array_equal(raw.logits, reference.logits)
    np.testing.assert_array_equal(raw.boxes, reference.boxes)
