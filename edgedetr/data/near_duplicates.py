"""Find near-copies: images of the same content with different bytes (saved again, resized, a burst of one scene).

A difference hash (Krawetz 2013, "Kind of Like That"): the luma is averaged to 17 x 17 cells, and each of 512 bits says
whether a cell is brighter than its left (256 bits) or upper (256 bits) neighbor. Two images are near-copies where at
most LIMIT bits differ.

Measured on 364 images of blood cells under one microscope and 363 photos of playing cards (BCCD and cards):

    copies     JPEG quality 30 to 60, resized 0.5 to 1.3 times or to a square, brightened: at most 45 bits, mean 7 to 16
    different  least of all pairs of different scenes 113 bits (cards, one table) and 173 (BCCD); median 250
    seven pairs differed by 17 to 46 bits, six in cards and one in BCCD: all of them one scene taken twice

So copies are found, and two images of one kind are not. Frames of a fixed camera that differ only in a small object
count as near-copies, as they should for a score. Not found: crops of more than about 1 % of a side, rotations, mirror
images. Images without contrast (a covered lens) have no hash, because all of them would be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from edgedetr.data import images
from edgedetr.errors import DataError

SIDE = 16  # cells; SIDE^2 bits for each of the two directions
BITS = 2 * SIDE**2
LIMIT = 64  # bits that near-copies may differ in: between 45 of copies and 113 of different scenes
CONTRAST = 4.0  # standard deviation of the cells, levels of 255; the least in the two sets was 8
ENOUGH = 256  # pixels of the shorter side after reduction; more do not change a mean over 17 cells
ROWS = 1024  # hashes compared at a time: 4 bytes x ROWS x the other set's size


@dataclass(frozen=True)
class NearCopy:
    """Two files of one scene, and how many of the BITS bits differ."""

    first: Path
    second: Path
    distance: int


def fingerprint(pixels: np.ndarray) -> np.ndarray | None:
    """The hash of an image; None where its contrast is too low to distinguish it from others.

    pixels   [H, W, 3]  uint8, RGB
    return   [512]      bool
    """
    step = max(1, min(pixels.shape[:2]) // ENOUGH)
    luma = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step])).convert("L")
    cells = np.asarray(luma.resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)).astype(np.int16)
    if cells.std() < CONTRAST:
        return None
    return np.concatenate(
        [(cells[:SIDE, 1:] > cells[:SIDE, :-1]).ravel(), (cells[1:, :SIDE] > cells[:-1, :SIDE]).ravel()]
    )


def nearest(
    first: Sequence[np.ndarray | None], second: Sequence[np.ndarray | None], limit: int = LIMIT
) -> list[tuple[int, int, int]]:
    """For every hash of `second` the nearest of `first` within `limit`: (index in first, index in second, bits)."""
    in_first = [index for index, bits in enumerate(first) if bits is not None]
    in_second = [index for index, bits in enumerate(second) if bits is not None]
    if not in_first or not in_second:
        return []
    # With bits as -1 and 1, the inner product is BITS - 2 x distance: one matrix product compares all pairs.
    one, other = (
        np.array([hashes[i] for i in indices], np.float32) * 2 - 1
        for hashes, indices in ((first, in_first), (second, in_second))
    )
    found = []
    for start in range(0, len(in_second), ROWS):
        products = other[start : start + ROWS] @ one.T
        best = products.argmax(axis=1)
        for row, column in enumerate(best):
            distance = round((BITS - float(products[row, column])) / 2)
            if distance <= limit:
                found.append((in_first[int(column)], in_second[start + row], distance))
    return found


def near_copies(first: Sequence[Path], second: Sequence[Path], *, limit: int = LIMIT) -> list[NearCopy]:
    """For every file of `second` that is a near-copy of one of `first`: the two, nearest first.

    A file that cannot be decoded is left out: readers of data sets report it. Equal bytes are near-copies too.
    """
    found = nearest([_of(path) for path in first], [_of(path) for path in second], limit)
    pairs = [NearCopy(Path(first[a]), Path(second[b]), bits) for a, b, bits in found]
    return sorted(pairs, key=lambda pair: pair.distance)


def _of(path: Path) -> np.ndarray | None:
    try:
        return fingerprint(images.decode(path))
    except DataError:
        return None
