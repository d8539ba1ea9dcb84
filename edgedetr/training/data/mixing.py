"""Training images made of several: mosaic, mixup and cutmix, with the boxes of all that can still be seen.

Bochkovskiy et al. 2020, "YOLOv4" (mosaic); Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix"; Huang et al. 2024,
"DEIM", section 3.1: more objects in an image are more positive queries for a detector that matches one to one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from edgedetr.boxes import area
from edgedetr.bundle import InputContract
from edgedetr.training.data.randaugment import MIN_PIXELS, Example

COVERED = 0.7  # a box of which more than this share is pasted over is dropped
SEEN = 0.3  # a donor's box is taken when at least this share of it lies in the pasted part
CENTER = (0.3, 0.7)  # where the four images of a mosaic meet, share of the sides
PASTED = (0.3, 0.7)  # sides of the rectangle of cutmix, share of the image's

Take = Callable[[InputContract], Example]  # another image, varied, at some size


def mosaic(take: Take, contract: InputContract, rng: np.random.Generator) -> Example:
    """Four images, one in each corner, each wholly seen at the size of its corner."""
    x, y = (round(side * rng.uniform(*CENTER)) for side in (contract.width, contract.height))
    pixels = torch.empty(3, contract.height, contract.width, dtype=torch.uint8)
    boxes, labels = [], []
    for top, bottom in ((0, y), (y, contract.height)):
        for left, right in ((0, x), (x, contract.width)):
            part = take(InputContract(bottom - top, right - left, contract.resize))
            pixels[:, top:bottom, left:right] = part.pixels
            boxes.append(part.boxes + [left, top, left, top])
            labels.append(part.labels)
    return Example(pixels, np.concatenate(boxes), np.concatenate(labels))


def mixup(one: Example, other: Example, share: float) -> Example:
    """`share` of the first image and the rest of the second, laid over each other; the objects of both."""
    blended = one.pixels.float() * share + other.pixels.float() * (1 - share)
    return Example(
        blended.round_().to(torch.uint8),
        np.concatenate([one.boxes, other.boxes]),
        np.concatenate([one.labels, other.labels]),
    )


def cutmix(base: Example, donor: Example, rectangle: tuple[int, int, int, int]) -> Example:
    """The rectangle x0, y0, x1, y1 of the donor pasted over the base; boxes end where the paste begins, or go."""
    x0, y0, x1, y1 = rectangle
    pixels = base.pixels.clone()
    pixels[:, y0:y1, x0:x1] = donor.pixels[:, y0:y1, x0:x1]
    rest = remaining(base.boxes, np.array(rectangle, np.float64))
    hidden = _overlap(base.boxes, rectangle)
    keep = (hidden <= COVERED * area(base.boxes)) & (rest[:, 2:] - rest[:, :2] >= MIN_PIXELS).all(axis=1)
    pasted = np.clip(donor.boxes, [x0, y0, x0, y0], [x1, y1, x1, y1])
    take = (area(pasted) >= SEEN * area(donor.boxes)) & (pasted[:, 2:] - pasted[:, :2] >= MIN_PIXELS).all(axis=1)
    return Example(
        pixels, np.concatenate([rest[keep], pasted[take]]), np.concatenate([base.labels[keep], donor.labels[take]])
    )


def draw_rectangle(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Where cutmix pastes: x0, y0, x1, y1."""
    w, h = (max(round(side * rng.uniform(*PASTED)), 1) for side in (width, height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return x, y, x + w, y + h


def remaining(boxes: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """What is left of boxes [T, 4] beside a hole x0, y0, x1, y1: shorter where the hole spans a whole side, else whole.

    A hole that leaves parts on both sides, or bites a corner, leaves a box of the same extent.
    """
    left = boxes.copy()
    for low, high, other_low, other_high in ((0, 2, 1, 3), (1, 3, 0, 2)):
        spans = (hole[other_low] <= boxes[:, other_low]) & (hole[other_high] >= boxes[:, other_high])
        from_low = spans & (hole[low] <= boxes[:, low]) & (hole[high] > boxes[:, low])
        from_high = spans & (hole[high] >= boxes[:, high]) & (hole[low] < boxes[:, high])
        left[from_low, low] = np.minimum(hole[high], boxes[from_low, high])
        left[from_high, high] = np.maximum(hole[low], left[from_high, low])
    return left


def _overlap(boxes: np.ndarray, rectangle: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = rectangle
    return area(np.clip(boxes, [x0, y0, x0, y0], [x1, y1, x1, y1]))
