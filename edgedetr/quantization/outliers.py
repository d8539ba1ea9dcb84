"""Calibration images that do not belong: a few whose activations exceed those of all others widen the ranges of all.

Saturated, noisy or foreign frames among a hundred good images move half of the ranges of a detector by 1.2 to 5 times,
whatever the observer, and every good image then pays with coarser steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# An image stands out in a tensor where its largest magnitude is FACTOR times that of the others, and is reported where
# it stands out in SHARE of the tensors. Measured with an rt_detr trained on BCCD (110 tensors, 128 images): of BCCD's
# own images the most extreme stands out in 3 % of the tensors, of 128 cards in 16 %, and a frame of noise, of black and
# white dots, all black, or a card among BCCD's in 46 to 61 %. A white frame stands out in 1 %: it moves no range.
FACTOR = 1.25
SHARE = 0.25
FEW = 0.05  # of the images: at most so many can stand out; more are another kind of image, not a few bad ones
MOVED = 1.2  # a range that changes by this factor or more has moved


def standouts(peaks: np.ndarray) -> dict[int, float]:
    """{image: share of the tensors in which it exceeds the others}, for images with at least `SHARE`.

    peaks   [T, I] largest magnitude of each of T tensors on each of I images

    The others are all images but the most extreme 5 % (at least one) of each tensor, so that two bad images do not hide
    each other.
    """
    tensors, images = peaks.shape
    few = max(1, int(images * FEW))
    if tensors == 0 or images <= few + 1:
        return {}
    rest = np.sort(peaks, axis=1)[:, images - few - 1]  # [T] largest of the others
    shares = (peaks > FACTOR * rest[:, None]).mean(axis=0)  # [I]
    return {int(index): float(shares[index]) for index in np.flatnonzero(shares >= SHARE)}


def moved(with_them: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
    """{tensor: factor >= MOVED by which its range changes without the images}, the largest factor first.

    A range that is 0 on one side alone has moved by infinity.
    """
    found = {}
    for name, one in with_them.items():
        low, high = sorted((one, without[name]))
        factor = high / low if low else (float("inf") if high else 1.0)
        if factor >= MOVED:
            found[name] = factor
    return dict(sorted(found.items(), key=lambda item: -item[1]))
