"""Detections drawn into an image: a colored box per object, a filled tag with class and confidence."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedetr.errors import MissingDependency
from edgedetr.packages import missing
from edgedetr.printable import one_line
from edgedetr.runtime.postprocess import Detections

if TYPE_CHECKING:
    from PIL import ImageDraw

Box = tuple[float, float, float, float]

# Distinct on photographs and for color-blind readers, after Okabe and Ito 2008; further classes get other hues.
PALETTE = (
    (230, 80, 30),
    (30, 130, 230),
    (0, 170, 120),
    (240, 190, 20),
    (200, 80, 180),
    (90, 200, 240),
    (140, 90, 60),
    (150, 200, 40),
)
GOLDEN = 0.618034
LONGEST_NAME = 24  # characters of a class name in a tag


def color_of(class_id: int) -> tuple[int, int, int]:
    """RGB color of a class, the same in every image."""
    if class_id < len(PALETTE):
        return PALETTE[class_id]
    r, g, b = colorsys.hsv_to_rgb(class_id * GOLDEN % 1, 0.75, 0.9)
    return int(r * 255), int(g * 255), int(b * 255)


def draw(image: np.ndarray, detections: Detections, *, confidence: float = 0.0) -> np.ndarray:
    """A copy of the image with the detections at or above `confidence` drawn in.

    image   [H, W, 3] uint8 RGB
    return  [H, W, 3] uint8 RGB
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingDependency(missing("PIL", error)) from error
    shown = detections.above(confidence)
    canvas = Image.fromarray(np.ascontiguousarray(image))
    pen = ImageDraw.Draw(canvas, "RGB")
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / 220))
    font = _font(max(10, round(min(height, width) / 32)))
    # The most confident box is drawn last, on top; its tag is placed first, at the best position.
    for n in reversed(range(len(shown))):
        pen.rectangle(_inside(shown.xyxy[n], width, height), outline=color_of(int(shown.class_id[n])), width=line)
    tags: list[Box] = []
    for n in range(len(shown)):
        tags.append(
            _tag(
                pen,
                font,
                _label(shown, n),
                _inside(shown.xyxy[n], width, height),
                color_of(int(shown.class_id[n])),
                tags,
                (width, height),
            )
        )
    return np.asarray(canvas)


def _inside(box: np.ndarray, width: int, height: int) -> Box:
    """Pixel corners that PIL can draw: inside the image, and ordered."""
    x0, y0, x1, y1 = (float(v) for v in box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0), width - 1), min(max(y1, y0), height - 1)


def _label(detections: Detections, n: int) -> str:
    names = detections.data.get("class_name")
    name = str(names[n]) if names is not None else f"class {detections.class_id[n]}"
    name = one_line(name[: LONGEST_NAME + 1])
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\u2026"
    return f"{name} {detections.confidence[n]:.2f}"


def _tag(
    pen: ImageDraw.ImageDraw,
    font: Any,
    text: str,
    box: Box,
    color: tuple[int, int, int],
    tags: list[Box],
    size: tuple[int, int],
) -> Box:
    """Draw the tag above, inside or below the box, at the first position in the image that no other tag covers."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    pad = max(1, round((bottom - top) / 5))
    w, h = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(max(box[0], 0), max(0, size[0] - w))
    free = [(x, y, x + w, y + h) for y in (box[1] - h, box[1], box[3] - h, box[3]) if 0 <= y <= size[1] - h]
    position = next((f for f in free if not any(_overlap(f, t) for t in tags)), (free or [(x, 0, x + w, h)])[0])
    pen.rectangle(position, fill=color)
    # Rec. 601 luma: dark letters on bright tags
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = (0, 0, 0) if luma > 140 else (255, 255, 255)
    pen.text((position[0] + pad - left, position[1] + pad - top), text, font=font, fill=ink)
    return position


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _font(size: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except TypeError:  # Pillow before 10.1 has one small bitmap font
        return ImageFont.load_default()
