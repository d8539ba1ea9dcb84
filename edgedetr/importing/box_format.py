"""What four numbers of a box mean: center and size, two corners, or a corner and a size; shares of the image or pixels.

The numbers themselves refute most readings: a width is not negative, and few boxes leave the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from edgedetr.errors import ExportError
from edgedetr.options import one_of

Layout = Literal["cxcywh", "xyxy", "xywh"]
LAYOUTS: tuple[Layout, ...] = ("cxcywh", "xyxy", "xywh")
WORDS = {"cxcywh": "center and size", "xyxy": "two corners", "xywh": "top-left corner and size"}
# What --boxes takes.
OPTIONS = (*LAYOUTS, *(f"{name}-pixels" for name in LAYOUTS))

SHARES, PIXELS = 2.5, 8.0  # largest number of a box up to which it is a share, and from which it is in pixels
VALID = 0.99  # part of the boxes whose width and height must not be negative
_EDGE = 0.02  # share of the image by which a box may stand out and still count as within


@dataclass(frozen=True)
class BoxForm:
    """How boxes are written.

    layout    which numbers
    unit      (x, y): what stands for the whole width and height of the input
    """

    layout: Layout = "cxcywh"
    unit: tuple[float, float] = (1.0, 1.0)

    def corners(self, boxes: np.ndarray) -> np.ndarray:
        """xyxy in shares of the image, of boxes [..., 4] as they are written."""
        return to_corners(boxes / np.array(self.unit * 2), self.layout)

    @property
    def option(self) -> str:
        return self.layout + ("" if self.unit == (1.0, 1.0) else "-pixels")

    def words(self) -> str:
        unit = "shares of the image" if self.unit == (1.0, 1.0) else f"units of {self.unit[0]:g} x {self.unit[1]:g}"
        return f"boxes are {', '.join(_COLUMNS[self.layout])} ({WORDS[self.layout]}) in {unit}"


_COLUMNS = {"cxcywh": ("cx", "cy", "w", "h"), "xyxy": ("x0", "y0", "x1", "y1"), "xywh": ("x0", "y0", "w", "h")}


@dataclass(frozen=True)
class Fitting:
    """Layouts that the numbers allow, the best first.

    decided   whether the first is clearly the best
    why       one sentence
    """

    layouts: tuple[Layout, ...]
    decided: bool
    why: str


def to_corners(boxes: np.ndarray, layout: str) -> np.ndarray:
    """xyxy [..., 4] of boxes in another layout, in the same unit."""
    one_of("layout", layout, get_args(Layout))
    first, second = boxes[..., :2], boxes[..., 2:]
    if layout == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], -1)
    return np.concatenate([first, first + second], -1) if layout == "xywh" else boxes


def from_corners(boxes: np.ndarray, layout: str) -> np.ndarray:
    """Boxes [..., 4] in a layout, of xyxy in the same unit."""
    one_of("layout", layout, get_args(Layout))
    first, second = boxes[..., :2], boxes[..., 2:]
    if layout == "cxcywh":
        return np.concatenate([(first + second) / 2, second - first], -1)
    return np.concatenate([first, second - first], -1) if layout == "xywh" else boxes


def in_pixels(boxes: np.ndarray) -> bool:
    """Whether boxes [..., 4] are in pixels; ExportError where they may be either."""
    largest = float(np.abs(boxes).max(initial=0))
    if SHARES < largest < PIXELS:
        raise ExportError(
            f"boxes go from {boxes.min():.3g} to {boxes.max():.3g}; expected shares of the image (0..1) "
            f"or pixels; say which: --boxes with one of {', '.join(OPTIONS)}"
        )
    return largest >= PIXELS


def fitting(boxes: np.ndarray) -> Fitting:
    """Which layouts the boxes [..., 4], in shares of the image, allow; ExportError where it is none."""
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    valid, outside = {}, {}
    for layout in LAYOUTS:
        corners = to_corners(boxes, layout)
        valid[layout] = float((corners[:, 2:] - corners[:, :2] >= -1e-4).all(1).mean())
        outside[layout] = float(((corners < -_EDGE) | (corners > 1 + _EDGE)).any(1).mean())
    allowed = sorted((name for name in LAYOUTS if valid[name] >= VALID), key=lambda name: outside[name])
    if not allowed:
        raise ExportError(
            f"boxes go from {boxes.min():.3g} to {boxes.max():.3g} (shares of the image), and are "
            "neither cx, cy, w, h nor corners: widths would be negative in every reading; expected boxes "
            "[N, 4]; export the model without its post-processing"
        )
    best = allowed[0]
    if _far(to_corners(boxes, best)) > 0.5:
        raise ExportError(
            f"boxes go from {boxes.min():.3g} to {boxes.max():.3g} shares of the image, and most would "
            "lie far outside of it in every reading; expected cx, cy, w, h as shares of the image, or "
            "pixels of the input; export the model without scaling its boxes"
        )
    refuted = [
        f"{name} is none: {100 * (1 - valid[name]):.0f} % of the widths or heights would be negative"
        for name in LAYOUTS
        if valid[name] < VALID
    ]
    near = [name for name in allowed if outside[name] <= max(2 * outside[best], outside[best] + 0.05)]
    refuted += [
        f"as {name} {100 * outside[name]:.0f} % of the boxes would leave the image, as {best} "
        f"{100 * outside[best]:.0f} %"
        for name in allowed
        if name not in near
    ]
    if set(near) == {"cxcywh", "xywh"}:  # no DETR gives a corner and a size: the tie is none
        best, near = "cxcywh", ["cxcywh"]
        refuted.append("xywh fits as well, which no DETR gives; --boxes xywh if this one does")
    return Fitting((best, *(name for name in allowed if name != best)), len(near) == 1, "; ".join(refuted))


def _far(corners: np.ndarray) -> float:
    """Part of the boxes that reach further than another image's size beyond the image."""
    return float(((corners < -1) | (corners > 2)).any(1).mean())


def require(boxes: np.ndarray, layout: str) -> None:
    """ExportError where boxes [..., 4] cannot be what --boxes says."""
    corners = to_corners(boxes.reshape(-1, 4), layout)
    valid = float((corners[:, 2:] - corners[:, :2] >= -1e-4).all(1).mean())
    if valid < VALID:
        raise ExportError(
            f"--boxes {layout}: {100 * (1 - valid):.0f} % of the widths or heights would be negative; "
            f"expected another of {', '.join(OPTIONS)}, or leave --boxes out"
        )


def refuse(found: Sequence[Layout]) -> ExportError:
    """The error where two layouts fit equally."""
    listed = " or ".join(f"{name} ({WORDS[name]})" for name in found)
    return ExportError(
        f"boxes may be {listed}: the numbers fit these readings equally; say which: --boxes "
        f"{' or --boxes '.join(found)}; or give labeled images, which may decide: --data DIR"
    )
