"""RandAugment and random erasing: chance operations on a training image, which its boxes follow.

Cubuk et al. 2020, "RandAugment", section 3 (N operations of one strength M, each equally likely); Zhong et al. 2020,
"Random Erasing". Color operations leave boxes alone; shears, shifts and turns move their four corners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from edgedetr.boxes import area
from edgedetr.runtime.preprocess import PADDING

STRONGEST = 10  # M runs from 0 to this
SHEAR = 0.3  # at the strongest, as are the next three; this is AutoAugment's
SHIFT = 0.25  # share of the side; less than AutoAugment's, so that fewer objects leave the image
TURN = 30.0  # degrees, AutoAugment's
ENHANCE = 0.9  # brightness, color, contrast and sharpness go from 1 - 0.9 to 1 + 0.9
VISIBLE = 0.2  # a box of which less than this share of the area is left is dropped
MIN_PIXELS = 1.0  # and one with a smaller side


@dataclass(frozen=True)
class Example:
    """One training image at the size of the input.

    pixels  [3, H, W] uint8, RGB
    boxes   [T, 4] float64, x0, y0, x1, y1 in pixels
    labels  [T] int64
    """

    pixels: Tensor
    boxes: np.ndarray
    labels: np.ndarray


Color = Callable[[Image.Image, float, float], Image.Image]  # image, strength 0..1, sign -1 or 1

COLORS: dict[str, Color] = {
    "autocontrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "posterize": lambda image, m, sign: ImageOps.posterize(image, 8 - round(4 * m)),
    "solarize": lambda image, m, sign: ImageOps.solarize(image, round(256 * (1 - m))),
    "color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * ENHANCE * m),
    "contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * ENHANCE * m),
    "brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * ENHANCE * m),
    "sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * ENHANCE * m),
}


def _turn(angle: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


# strength 0..1 (signed), width, height -> where a pixel goes, about the middle of the image: [3, 3]
GEOMETRIES: dict[str, Callable[[float, int, int], np.ndarray]] = {
    "shear_x": lambda m, w, h: np.array([[1, SHEAR * m, 0], [0, 1, 0], [0, 0, 1]]),
    "shear_y": lambda m, w, h: np.array([[1, 0, 0], [SHEAR * m, 1, 0], [0, 0, 1]]),
    "translate_x": lambda m, w, h: np.array([[1, 0, SHIFT * m * w], [0, 1, 0], [0, 0, 1]]),
    "translate_y": lambda m, w, h: np.array([[1, 0, 0], [0, 1, SHIFT * m * h], [0, 0, 1]]),
    "rotate": lambda m, w, h: _turn(TURN * m),
}
OPERATIONS = ("identity", *COLORS, *GEOMETRIES)


def rand_augment(example: Example, count: int, magnitude: float, rng: np.random.Generator) -> Example:
    """`count` operations drawn from OPERATIONS, each at strength `magnitude` of STRONGEST."""
    for name in rng.choice(OPERATIONS, count):
        example = apply(example, str(name), magnitude / STRONGEST, 1.0 if rng.random() < 0.5 else -1.0)
    return example


def apply(example: Example, name: str, strength: float, sign: float) -> Example:
    """One operation at strength 0..1; `sign` chooses the direction where it has two."""
    if name == "identity":
        return example
    image = Image.fromarray(example.pixels.permute(1, 2, 0).contiguous().numpy())
    if name in COLORS:
        return Example(_tensor(COLORS[name](image, strength, sign)), example.boxes, example.labels)
    width, height = image.size
    middle = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    forward = middle @ GEOMETRIES[name](sign * strength, width, height) @ np.linalg.inv(middle)
    backward = np.linalg.inv(forward)  # Pillow asks where each new pixel comes from
    moved = image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(backward[:2].ravel()),
        Image.Resampling.BILINEAR,
        fillcolor=(PADDING,) * 3,
    )
    boxes, keep = move(example.boxes, forward, width, height)
    return Example(_tensor(moved), boxes[keep], example.labels[keep])


def move(boxes: np.ndarray, forward: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The boxes [T, 4] around the four moved corners, clipped to the image, and which of them are kept [T]."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    corners = corners @ forward[:2, :2].T + forward[:2, 2]
    around = np.concatenate([corners.min(1), corners.max(1)], axis=1).reshape(-1, 4)
    seen = np.clip(around, 0, [width, height, width, height])
    keep = (area(seen) >= VISIBLE * area(around)) & (seen[:, 2:] - seen[:, :2] >= MIN_PIXELS).all(axis=1)
    return seen, keep


ERASED = (0.02, 0.33)  # share of the image's area
ERASED_ASPECT = (0.3, 3.3)  # width to height; both are the paper's
HIDDEN = 0.8  # a box of which more than this share is erased is dropped


def erase(example: Example, rng: np.random.Generator) -> Example:
    """A rectangle of noise somewhere; boxes that it hides go."""
    _, height, width = example.pixels.shape
    share, aspect = rng.uniform(*ERASED), np.exp(rng.uniform(*np.log(ERASED_ASPECT)))
    h = int(np.clip(round((share * height * width / aspect) ** 0.5), 1, height))
    w = int(np.clip(round((share * height * width * aspect) ** 0.5), 1, width))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    pixels = example.pixels.clone()
    pixels[:, y : y + h, x : x + w] = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
    inside = np.clip(example.boxes, [x, y, x, y], [x + w, y + h, x + w, y + h])
    keep = area(inside) <= HIDDEN * area(example.boxes)
    return Example(pixels, example.boxes[keep], example.labels[keep])


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
