"""Bounding boxes of COCO segmentations (polygons, run-length encoded masks), and detection of x0, y0, x1, y1 boxes."""

from __future__ import annotations

from itertools import chain

import numpy as np

from edgedetr.data.cleaning import RawImage, numbers
from edgedetr.data.detection_set import DataIssue

Corners = tuple[float, float, float, float]

MAX_RUNS = 1_000_000  # of one mask
FEWEST = 4  # boxes from which corners can be distinguished from sizes


def segmentation_box(segmentation: object) -> Corners | None:
    """x0, y0, x1, y1 in pixels of polygons (a list of lists of x, y) or a mask ({"size", "counts"}); None for others.

    The box of a mask ends after its last pixel, so that one pixel has a width of 1.
    """
    if isinstance(segmentation, dict):
        return _mask(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    points = [_points(part) for part in parts]
    kept = [part for part in points if part is not None]
    if not kept or len(kept) != len(points):
        return None
    x, y = list(chain(*(part[0::2] for part in kept))), list(chain(*(part[1::2] for part in kept)))
    return min(x), min(y), max(x), max(y)


def _points(part: object) -> tuple[float, ...] | None:
    if not isinstance(part, list):
        return None
    if part and isinstance(part[0], list):  # [[x, y], [x, y]] of some writers
        part = list(chain.from_iterable(point if isinstance(point, list) else [None] for point in part))
    return numbers(part, len(part)) if len(part) >= 4 and len(part) % 2 == 0 else None


def _mask(mask: dict[str, object]) -> Corners | None:
    size, counts = numbers(mask.get("size"), 2), mask.get("counts")
    if size is None or min(size) < 1 or max(size) > 1e6:
        return None
    height, width = int(size[0]), int(size[1])
    if isinstance(counts, str):
        runs = _decompressed(counts)
    else:
        plain = numbers(counts, len(counts)) if isinstance(counts, list) and len(counts) <= MAX_RUNS else None
        runs = None if plain is None or not plain or max(plain) > 1e12 else np.array(plain).astype(np.int64)
    if runs is None or (runs < 0).any() or int(runs.sum()) > height * width:
        return None
    ends = np.cumsum(runs)
    first, last = ends[0:-1:2], ends[1::2] - 1  # runs count down the columns, beginning with background
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        return None
    several = (first // height != last // height).any()
    top, bottom = (0, height - 1) if several else (int((first % height).min()), int((last % height).max()))
    return float(first.min() // height), float(top), float(last.max() // height + 1), float(bottom + 1)


def _decompressed(text: str) -> np.ndarray | None:
    """Runs of compressed text: 5 bits per character from "0" on; from the fourth run on, differences to two before."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60 or len(runs) > MAX_RUNS:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift or not runs or any(abs(run) > 1e12 for run in runs):
        return None
    return np.array(runs, np.int64)


def is_empty(corner: tuple[float, ...] | None) -> bool:
    """Whether a bbox (x, y, width, height) is missing or without area."""
    return corner is None or corner[2] <= 0 or corner[3] <= 0


def drop_corners(images: list[RawImage], issues: list[DataIssue]) -> None:
    """Leave out every box of a file whose bbox holds two corners instead of a corner and a size.

    A single box can be either. All boxes together cannot: read as corners, all have an area and end inside of their
    images; read as sizes, many extend beyond them.
    """
    sized = [(image.size, item.xyxy) for image in images if image.size is not None for item in image.objects]
    out = 0
    for (height, width), (x0, y0, x1, y1) in sized:
        if not (x0 < x1 - x0 <= width + 1 and y0 < y1 - y0 <= height + 1):
            return
        out += x1 > width + 1 or y1 > height + 1
    if len(sized) < FEWEST or out * 4 < len(sized):
        return
    for image in images:
        if image.objects:
            x0, y0, x1, y1 = image.objects[0].xyxy
            issues.append(
                DataIssue(
                    "box-in-corners",
                    str(image.path),
                    "the bbox values of all annotations fit as x0, y0, x1, "
                    f"y1 and extend beyond the images as x, y, width, height, as {[x0, y0, x1 - x0, y1 - y0]} here; "
                    "COCO defines the latter; write width and height",
                    True,
                    len(image.objects),
                )
            )
            image.objects = []
