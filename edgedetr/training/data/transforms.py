"""Varied training images: one window on the image, one resampling, one color matrix; boxes follow exactly.

Crop, zoom-out and scale jitter only choose the window, so an image is interpolated once whatever is switched on.
Everything is a function of the random generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgedetr.boxes import area, clip, iou
from edgedetr.bundle import InputContract
from edgedetr.runtime.preprocess import PADDING
from edgedetr.training.config import AugmentConfig
from edgedetr.training.data.mixing import cutmix, draw_rectangle, mixup, mosaic
from edgedetr.training.data.randaugment import MIN_PIXELS, Example, erase, rand_augment

MIN_IOU = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # one is drawn per crop (Liu et al. 2016, "SSD", section 2.2)
SHORTER, CROPPED = (400.0, 500.0, 600.0), (384.0, 600.0)  # pixels, of DETR's crop
TRIALS = 20  # crops tried for it

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Picture:
    """A decoded image and its objects, in pixels of `pixels`.

    pixels        [3, H, W] uint8, RGB, quickest where the three colors of a pixel lie together
    boxes         [T, 4] float64, x0, y0, x1, y1
    labels        [T] int64
    frame_height, frame_width   what the whole input covers: H and W, or more at the right or bottom for a letterbox
    """

    pixels: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    frame_height: float
    frame_width: float


def compose(
    picture: Picture,
    another: Callable[[], Picture],
    contract: InputContract,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> Example:
    """One training example from an image, and from others where mosaic, mixup or cutmix fall on it.

    Each technique that is off draws nothing, so that switching one on does not change another's luck before it.
    """

    def take(size: InputContract) -> Example:
        return vary(another(), size, config, rng)

    mixed = bool(config.mosaic) and rng.random() < config.mosaic
    example = mosaic(take, contract, rng) if mixed else vary(picture, contract, config, rng)
    if config.mixup and rng.random() < config.mixup:
        example = mixup(example, take(contract), rng.beta(config.mixup_beta, config.mixup_beta))
    elif config.cutmix and rng.random() < config.cutmix:
        example = cutmix(example, take(contract), draw_rectangle(contract.height, contract.width, rng))
    if config.rand_augment:
        example = rand_augment(example, config.rand_augment, config.magnitude, rng)
    if config.erase and rng.random() < config.erase:
        example = erase(example, rng)
    return example


def vary(
    picture: Picture,
    contract: InputContract,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    flips_only: bool = False,
) -> Example:
    """One training example of one image: a window on it, flips, colors."""
    whole = np.array([0.0, 0.0, picture.frame_width, picture.frame_height])
    window = whole if flips_only else _window(picture, config, rng)
    pixels, boxes, labels = look(picture, window, contract, config.min_visible)
    # Both numbers are drawn whatever the probabilities are, so that one setting does not move another's luck.
    horizontal, vertical = rng.random(2) < (config.flip_horizontal, config.flip_vertical)
    if horizontal:
        pixels = pixels.flip(2)
        boxes[:, [0, 2]] = contract.width - boxes[:, [2, 0]]
    if vertical:
        pixels = pixels.flip(1)
        boxes[:, [1, 3]] = contract.height - boxes[:, [3, 1]]
    if not flips_only and rng.random() < config.color:
        pixels = recolor(pixels, config, rng)
    return Example(pixels, boxes, labels)


def look(
    picture: Picture, window: np.ndarray, contract: InputContract, min_visible: float
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """What is seen of an image through a window, at the size of the input; gray where there is no image.

    window  x0, y0, x1, y1 in pixels of the image, may reach beyond it
    """
    _, height, width = picture.pixels.shape
    source = np.array([max(window[0], 0), max(window[1], 0), min(window[2], width), min(window[3], height)])
    source = np.rint(source).astype(int)
    source[:2] = np.minimum(source[:2], [width - 1, height - 1])  # a letterbox crop may lie in the gray
    source[2:] = np.maximum(source[2:], source[:2] + 1)
    scale = np.array([contract.width / (window[2] - window[0]), contract.height / (window[3] - window[1])])
    target = np.rint((source.reshape(2, 2) - np.rint(window[:2])) * scale).astype(int).ravel()
    target = np.clip(target, 0, [contract.width, contract.height] * 2)
    target[:2] = np.minimum(target[:2], np.array([contract.width, contract.height]) - 1)
    target[2:] = np.maximum(target[2:], target[:2] + 1)
    size, crop = target[2:] - target[:2], source[2:] - source[:2]

    seen = picture.pixels[:, source[1] : source[3], source[0] : source[2]]
    if tuple(size) != tuple(crop):
        small = bool((crop > 2 * size).any())  # only then would plain bilinear skip pixels
        # In bytes: within 1 of 255 of the float arithmetic, at a fifth of its time.
        seen = F.interpolate(seen[None], (int(size[1]), int(size[0])), mode="bilinear", antialias=small)[0]
    if tuple(size) == (contract.width, contract.height):
        pixels = seen
    else:
        pixels = torch.full((3, contract.height, contract.width), PADDING, dtype=torch.uint8)
        pixels[:, target[1] : target[3], target[0] : target[2]] = seen

    ratio = np.tile(size / crop, 2)
    boxes = (picture.boxes - np.tile(source[:2], 2)) * ratio + np.tile(target[:2], 2)
    visible = np.clip(boxes, np.tile(target[:2], 2), np.tile(target[2:], 2))
    keep = area(visible) >= min_visible * area(boxes)
    keep &= (visible[:, 2:] - visible[:, :2] >= MIN_PIXELS).all(axis=1)
    return pixels, visible[keep], picture.labels[keep]


def _window(picture: Picture, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """The part of the frame that is looked at, x0, y0, x1, y1; larger than the frame for zoom-out."""
    frame = np.array([picture.frame_width, picture.frame_height])
    crop, zoom = rng.random(2) < (config.crop, config.zoom_out)
    if crop and config.crop_kind == "size":
        low = _crop_by_size(frame, rng)
    elif crop:
        low = _crop(picture, frame, config, rng)
    elif zoom:
        side = frame * rng.uniform(1, config.zoom_out_scale)
        corner = -rng.random(2) * (side - frame)
        low = np.concatenate([corner, corner + side])
    else:
        low = np.concatenate([np.zeros(2), frame])
    jitter = 1 + rng.uniform(-config.scale_jitter, config.scale_jitter)
    center, half = (low[:2] + low[2:]) / 2, (low[2:] - low[:2]) / 2 * jitter
    return np.concatenate([center - half, center + half])


def _crop(picture: Picture, frame: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A random part of the frame that holds a box's center and overlaps that box by a drawn IoU, if it can be found."""
    least = rng.choice(MIN_IOU)
    inside = clip(picture.boxes, picture.frame_height, picture.frame_width)
    centers = (inside[:, :2] + inside[:, 2:]) / 2
    for _ in range(TRIALS):
        scale, aspect = rng.uniform(*config.crop_scale), np.exp(rng.uniform(*np.log(config.crop_aspect)))
        side = frame * np.clip(scale * np.array([aspect**0.5, aspect**-0.5]), 0.05, 1)
        corner = rng.random(2) * (frame - side)
        window = np.concatenate([corner, corner + side])
        held = ((centers > window[:2]) & (centers < window[2:])).all(axis=1)
        if not len(inside) or (held.any() and iou(window[None], inside[held]).max() >= least):
            return window
    # Boxes too small, or too few, for what was drawn: a crop of this size around one of them.
    corner = np.clip(centers[rng.integers(len(centers))] - rng.random(2) * side, 0, frame - side)
    return np.concatenate([corner, corner + side])


def _crop_by_size(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """DETR's crop (datasets/transforms.py): 384 to 600 px a side, as if the shorter side had 400, 500 or 600 px."""
    sides = frame * rng.choice(SHORTER) / frame.min()
    side = frame * rng.uniform(np.minimum(CROPPED[0], sides), np.minimum(CROPPED[1], sides)) / sides
    corner = rng.random(2) * (frame - side)
    return np.concatenate([corner, corner + side])


def recolor(pixels: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue as one 3 x 3 matrix and an offset; [3, H, W] uint8 -> the same."""
    brightness, contrast, saturation = (
        1 + rng.uniform(-limit, limit) for limit in (config.brightness, config.contrast, config.saturation)
    )
    turn = 2 * np.pi * rng.uniform(-config.hue, config.hue)
    cosine, sine = saturation * np.cos(turn), saturation * np.sin(turn)
    chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])  # luma stays, the color plane turns
    matrix = brightness * contrast * (_RGB @ chroma @ _YIQ)
    flat = pixels.reshape(3, -1).float()
    gray = float(torch.from_numpy(_YIQ[0]).float() @ flat.mean(1))
    mixed = torch.from_numpy(matrix).float() @ flat
    mixed += brightness * (1 - contrast) * gray
    return mixed.round_().clamp_(0, 255).to(torch.uint8).reshape(pixels.shape)
