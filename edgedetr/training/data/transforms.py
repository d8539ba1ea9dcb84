"""Makes a training example from a decoded image: crop, flips, colors, mosaic, mixup, cutmix, RandAugment, erasing.

Crop, zoom-out and scale jitter only choose a window on the image, so an image is interpolated once, whatever is
switched on; the boxes follow exactly. Every random number comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from edgedetr.boxes import area, clip, iou
from edgedetr.bundle import InputContract
from edgedetr.runtime.preprocess import PADDING
from edgedetr.training.config import AugmentConfig

MIN_PIXELS = 1.0  # a box with a smaller side is dropped


@dataclass(frozen=True)
class SourceImage:
    """A decoded image and its objects, in pixels of `pixels`.

    pixels        [3, H, W] uint8, RGB; channels last in memory is the fastest
    boxes         [T, 4] float64, x0, y0, x1, y1
    labels        [T] int64
    frame_height, frame_width   the area that the whole input covers: H and W, or more at the right or at the bottom
                  for a letterbox
    """

    pixels: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    frame_height: float
    frame_width: float


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


def transform(
    image: SourceImage,
    draw_other: Callable[[], SourceImage],
    contract: InputContract,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    mixes: bool = True,
) -> Example:
    """One training example from an image, and from others where mosaic, mixup or cutmix is drawn.

    draw_other  returns another image of the set, drawn with `rng`
    mixes       False: no mosaic, mixup or cutmix

    A technique that is off draws no number, so switching one on does not change what was drawn before it.
    """

    def take(size: InputContract) -> Example:
        return augment(draw_other(), size, config, rng)

    def one(source: SourceImage) -> Example:
        if not (mixes and config.mosaic and rng.random() < config.mosaic):
            return augment(source, contract, config, rng)
        if config.mosaic_kind == "affine":
            return affine_mosaic([source, draw_other(), draw_other(), draw_other()], contract, config, rng)
        return mosaic(take, contract, rng)

    example = one(image)
    if mixes and config.mixup and rng.random() < config.mixup:
        # DEIM blends two images of a batch, and so two mosaics too.
        other = one(draw_other()) if config.mosaic_kind == "affine" else take(contract)
        example = mixup(example, other, rng.beta(config.mixup_beta, config.mixup_beta))
    elif mixes and config.cutmix and rng.random() < config.cutmix:
        example = cutmix(example, take(contract), draw_rectangle(contract.height, contract.width, rng))
    if config.rand_augment:
        example = rand_augment(example, config.rand_augment, config.magnitude, rng)
    if config.erase and rng.random() < config.erase:
        example = erase(example, rng)
    return example


def augment(
    image: SourceImage,
    contract: InputContract,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    flips_only: bool = False,
) -> Example:
    """One training example from one image: a window on it, flips, colors."""
    whole = np.array([0.0, 0.0, image.frame_width, image.frame_height])
    window = whole if flips_only else draw_window(image, config, rng)
    example = Example(*crop_window(image, window, contract, config.min_visible))
    return _flip_and_recolor(example, config, rng, flips_only=flips_only)


def _flip_and_recolor(
    example: Example, config: AugmentConfig, rng: np.random.Generator, *, flips_only: bool = False
) -> Example:
    pixels, boxes = example.pixels, example.boxes
    height, width = pixels.shape[1:]
    # Both numbers are drawn whatever the probabilities are, so that one setting does not change the other's draw.
    horizontal, vertical = rng.random(2) < (config.flip_horizontal, config.flip_vertical)
    if horizontal:
        pixels = pixels.flip(2)
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    if vertical:
        pixels = pixels.flip(1)
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
    if not flips_only and rng.random() < config.color:
        pixels = recolor(pixels, config, rng)
    return Example(pixels, boxes, example.labels)


# Windows. One window on the image replaces crop, zoom-out and scale jitter.

MIN_IOU = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # one is drawn per crop (Liu et al. 2016, "SSD", section 2.2)
TRIALS = 20  # crops tried for it
SHORTER, CROPPED = (400.0, 500.0, 600.0), (384.0, 600.0)  # pixels, of DETR's crop


def draw_window(image: SourceImage, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A window x0, y0, x1, y1 in pixels of the image; larger than the frame for zoom-out."""
    frame = np.array([image.frame_width, image.frame_height])
    crop, zoom = rng.random(2) < (config.crop, config.zoom_out)
    if crop and config.crop_kind == "size":
        window = _crop_by_size(frame, rng)
    elif crop:
        window = _crop_by_iou(image, frame, config, rng)
    elif zoom:
        side = frame * rng.uniform(1, config.zoom_out_scale)
        corner = -rng.random(2) * (side - frame)
        window = np.concatenate([corner, corner + side])
    else:
        window = np.concatenate([np.zeros(2), frame])
    jitter = 1 + rng.uniform(-config.scale_jitter, config.scale_jitter)
    center, half = (window[:2] + window[2:]) / 2, (window[2:] - window[:2]) / 2 * jitter
    return np.concatenate([center - half, center + half])


def _crop_by_iou(image: SourceImage, frame: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """SSD's crop: a random window that holds the center of a box and overlaps that box by a drawn IoU, if possible."""
    least = rng.choice(MIN_IOU)
    inside = clip(image.boxes, image.frame_height, image.frame_width)
    centers = (inside[:, :2] + inside[:, 2:]) / 2
    for _ in range(TRIALS):
        scale, aspect = rng.uniform(*config.crop_scale), np.exp(rng.uniform(*np.log(config.crop_aspect)))
        side = frame * np.clip(scale * np.array([aspect**0.5, aspect**-0.5]), 0.05, 1)
        corner = rng.random(2) * (frame - side)
        window = np.concatenate([corner, corner + side])
        held = ((centers > window[:2]) & (centers < window[2:])).all(axis=1)
        if not len(inside) or (held.any() and iou(window[None], inside[held]).max() >= least):
            return window
    # The boxes are too small or too few for the drawn IoU: a window of the last size around one of them.
    corner = np.clip(centers[rng.integers(len(centers))] - rng.random(2) * side, 0, frame - side)
    return np.concatenate([corner, corner + side])


def _crop_by_size(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """DETR's crop (datasets/transforms.py): sides of 384 to 600 px of an image whose shorter side is 400 to 600 px."""
    sides = frame * rng.choice(SHORTER) / frame.min()
    side = frame * rng.uniform(np.minimum(CROPPED[0], sides), np.minimum(CROPPED[1], sides)) / sides
    corner = rng.random(2) * (frame - side)
    return np.concatenate([corner, corner + side])


def crop_window(
    image: SourceImage, window: np.ndarray, contract: InputContract, min_visible: float
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Pixels, boxes and labels inside a window, resized to the input; gray where the window leaves the image.

    window       x0, y0, x1, y1 in pixels of the image; may reach beyond it
    min_visible  a box is dropped when a smaller fraction of its area is visible
    """
    _, height, width = image.pixels.shape
    source = np.array([max(window[0], 0), max(window[1], 0), min(window[2], width), min(window[3], height)])
    source = np.rint(source).astype(int)
    source[:2] = np.minimum(source[:2], [width - 1, height - 1])  # a crop of a letterbox may lie in its gray part
    source[2:] = np.maximum(source[2:], source[:2] + 1)
    scale = np.array([contract.width / (window[2] - window[0]), contract.height / (window[3] - window[1])])
    target = np.rint((source.reshape(2, 2) - np.rint(window[:2])) * scale).astype(int).ravel()
    target = np.clip(target, 0, [contract.width, contract.height] * 2)
    target[:2] = np.minimum(target[:2], np.array([contract.width, contract.height]) - 1)
    target[2:] = np.maximum(target[2:], target[:2] + 1)
    size, crop = target[2:] - target[:2], source[2:] - source[:2]

    inside = image.pixels[:, source[1] : source[3], source[0] : source[2]]
    if tuple(size) != tuple(crop):
        antialias = bool((crop > 2 * size).any())  # only then would bilinear interpolation skip pixels
        # In uint8: within 1 of 255 of the result in float, in a fifth of the time.
        inside = F.interpolate(inside[None], (int(size[1]), int(size[0])), mode="bilinear", antialias=antialias)[0]
    if tuple(size) == (contract.width, contract.height):
        pixels = inside
    else:
        pixels = torch.full((3, contract.height, contract.width), PADDING, dtype=torch.uint8)
        pixels[:, target[1] : target[3], target[0] : target[2]] = inside

    ratio = np.tile(size / crop, 2)
    boxes = (image.boxes - np.tile(source[:2], 2)) * ratio + np.tile(target[:2], 2)
    visible = np.clip(boxes, np.tile(target[:2], 2), np.tile(target[2:], 2))
    keep = area(visible) >= min_visible * area(boxes)
    keep &= (visible[:, 2:] - visible[:, :2] >= MIN_PIXELS).all(axis=1)
    return pixels, visible[keep], image.labels[keep]


# Colors.

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


def recolor(pixels: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue as one 3 x 3 matrix and an offset; [3, H, W] uint8 -> the same."""
    brightness, contrast, saturation = (
        1 + rng.uniform(-limit, limit) for limit in (config.brightness, config.contrast, config.saturation)
    )
    turn = 2 * np.pi * rng.uniform(-config.hue, config.hue)
    cosine, sine = saturation * np.cos(turn), saturation * np.sin(turn)
    chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])  # luma stays, the color plane rotates
    matrix = brightness * contrast * (_RGB @ chroma @ _YIQ)
    flat = pixels.reshape(3, -1).float()
    gray = float(torch.from_numpy(_YIQ[0]).float() @ flat.mean(1))
    mixed = torch.from_numpy(matrix).float() @ flat
    mixed += brightness * (1 - contrast) * gray
    return mixed.round_().clamp_(0, 255).to(torch.uint8).reshape(pixels.shape)


# Several images in one. More objects in an image are more positive queries for a detector that matches one to one
# (Huang et al. 2024, "DEIM", section 3.1).

MAX_COVERED = 0.7  # cutmix drops a box when the pasted part covers a larger fraction of it
MIN_PASTED = 0.3  # cutmix takes a box of the second image when at least this fraction of it is in the pasted part
MEETING_POINT = (0.3, 0.7)  # of the four images of a mosaic, as a fraction of the sides
PASTED_SIDE = (0.3, 0.7)  # of the rectangle of cutmix, as a fraction of the image's

Take = Callable[[InputContract], Example]  # another augmented image, at the given size


def mosaic(take: Take, contract: InputContract, rng: np.random.Generator) -> Example:
    """Four images, one in each corner, each complete at the size of its corner (Bochkovskiy et al. 2020, "YOLOv4")."""
    x, y = (round(side * rng.uniform(*MEETING_POINT)) for side in (contract.width, contract.height))
    pixels = torch.empty(3, contract.height, contract.width, dtype=torch.uint8)
    boxes, labels = [], []
    for top, bottom in ((0, y), (y, contract.height)):
        for left, right in ((0, x), (x, contract.width)):
            part = take(InputContract(bottom - top, right - left, contract.resize))
            pixels[:, top:bottom, left:right] = part.pixels
            boxes.append(part.boxes + [left, top, left, top])
            labels.append(part.labels)
    return Example(pixels, np.concatenate(boxes), np.concatenate(labels))


def affine_mosaic(
    images: Sequence[SourceImage], contract: InputContract, config: AugmentConfig, rng: np.random.Generator
) -> Example:
    """Four whole images, each a quarter, turned, scaled and shifted as one, then flipped and recolored (DEIM's code).

    It has no crop and no zoom-out.
    """
    x, y = contract.width // 2, contract.height // 2
    pixels = torch.empty(3, contract.height, contract.width, dtype=torch.uint8)
    boxes, labels = [], []
    corners = [
        (top, bottom, left, right)
        for top, bottom in ((0, y), (y, contract.height))
        for left, right in ((0, x), (x, contract.width))
    ]
    for image, (top, bottom, left, right) in zip(images, corners):
        whole = np.array([0.0, 0.0, image.frame_width, image.frame_height])
        part = Example(*crop_window(image, whole, InputContract(bottom - top, right - left), config.min_visible))
        pixels[:, top:bottom, left:right] = part.pixels
        boxes.append(part.boxes + [left, top, left, top])
        labels.append(part.labels)
    angle, scale = (
        np.radians(rng.uniform(-config.mosaic_degrees, config.mosaic_degrees)),
        rng.uniform(*config.mosaic_scale),
    )
    shift = rng.uniform(-config.mosaic_shift, config.mosaic_shift, 2) * [contract.width, contract.height]
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[cosine, -sine, shift[0]], [sine, cosine, shift[1]], [0, 0, 1]])
    joined = Example(pixels, np.concatenate(boxes), np.concatenate(labels))
    return _flip_and_recolor(warp(joined, matrix, config.min_visible), config, rng)


def mixup(one: Example, other: Example, weight: float) -> Example:
    """`weight` times the first image plus the rest of the second, with the objects of both (Zhang et al. 2018)."""
    blended = one.pixels.float() * weight + other.pixels.float() * (1 - weight)
    return Example(
        blended.round_().to(torch.uint8),
        np.concatenate([one.boxes, other.boxes]),
        np.concatenate([one.labels, other.labels]),
    )


def cutmix(base: Example, donor: Example, rectangle: tuple[int, int, int, int]) -> Example:
    """The rectangle x0, y0, x1, y1 of the donor pasted over the base (Yun et al. 2019); covered boxes shrink or go."""
    x0, y0, x1, y1 = rectangle
    pixels = base.pixels.clone()
    pixels[:, y0:y1, x0:x1] = donor.pixels[:, y0:y1, x0:x1]
    rest = shrink_beside(base.boxes, np.array(rectangle, np.float64))
    covered = _overlap(base.boxes, rectangle)
    keep = (covered <= MAX_COVERED * area(base.boxes)) & (rest[:, 2:] - rest[:, :2] >= MIN_PIXELS).all(axis=1)
    pasted = np.clip(donor.boxes, [x0, y0, x0, y0], [x1, y1, x1, y1])
    take = area(pasted) >= MIN_PASTED * area(donor.boxes)
    take &= (pasted[:, 2:] - pasted[:, :2] >= MIN_PIXELS).all(axis=1)
    return Example(
        pixels, np.concatenate([rest[keep], pasted[take]]), np.concatenate([base.labels[keep], donor.labels[take]])
    )


def draw_rectangle(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The rectangle that cutmix pastes: x0, y0, x1, y1."""
    w, h = (max(round(side * rng.uniform(*PASTED_SIDE)), 1) for side in (width, height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return x, y, x + w, y + h


def shrink_beside(boxes: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The extent of boxes [T, 4] outside of a hole x0, y0, x1, y1: a box shrinks where the hole spans a whole side.

    A hole that leaves parts on both sides, or covers only a corner, leaves a box of the same extent.
    """
    rest = boxes.copy()
    for low, high, other_low, other_high in ((0, 2, 1, 3), (1, 3, 0, 2)):
        spans = (hole[other_low] <= boxes[:, other_low]) & (hole[other_high] >= boxes[:, other_high])
        from_low = spans & (hole[low] <= boxes[:, low]) & (hole[high] > boxes[:, low])
        from_high = spans & (hole[high] >= boxes[:, high]) & (hole[low] < boxes[:, high])
        rest[from_low, low] = np.minimum(hole[high], boxes[from_low, high])
        rest[from_high, high] = np.maximum(hole[low], rest[from_high, low])
    return rest


def _overlap(boxes: np.ndarray, rectangle: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = rectangle
    return area(np.clip(boxes, [x0, y0, x0, y0], [x1, y1, x1, y1]))


# RandAugment: N operations of one strength M, each equally likely (Cubuk et al. 2020, section 3). Color operations
# leave boxes unchanged; shears, shifts and rotations move their four corners.

MAX_MAGNITUDE = 10  # M is in 0..10
SHEAR = 0.3  # at the largest magnitude, as are the next three; AutoAugment's
SHIFT = 0.25  # fraction of the side; less than AutoAugment's, so that fewer objects leave the image
ANGLE = 30.0  # degrees, AutoAugment's
ENHANCE = 0.9  # brightness, color, contrast and sharpness go from 1 - 0.9 to 1 + 0.9
MIN_VISIBLE = 0.2  # a moved box is dropped when a smaller fraction of its area is inside the image

ColorOperation = Callable[[Image.Image, float, float], Image.Image]  # image, strength 0..1, sign -1 or 1

COLORS: dict[str, ColorOperation] = {
    "autocontrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "posterize": lambda image, m, sign: ImageOps.posterize(image, 8 - round(4 * m)),
    "solarize": lambda image, m, sign: ImageOps.solarize(image, round(256 * (1 - m))),
    "color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * ENHANCE * m),
    "contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * ENHANCE * m),
    "brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * ENHANCE * m),
    "sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * ENHANCE * m),
}


def _rotation(angle: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


# (signed strength 0..1, width, height) -> the matrix [3, 3] that moves a pixel, relative to the center of the image
GEOMETRIES: dict[str, Callable[[float, int, int], np.ndarray]] = {
    "shear_x": lambda m, w, h: np.array([[1, SHEAR * m, 0], [0, 1, 0], [0, 0, 1]]),
    "shear_y": lambda m, w, h: np.array([[1, 0, 0], [SHEAR * m, 1, 0], [0, 0, 1]]),
    "translate_x": lambda m, w, h: np.array([[1, 0, SHIFT * m * w], [0, 1, 0], [0, 0, 1]]),
    "translate_y": lambda m, w, h: np.array([[1, 0, 0], [0, 1, SHIFT * m * h], [0, 0, 1]]),
    "rotate": lambda m, w, h: _rotation(ANGLE * m),
}
OPERATIONS = ("identity", *COLORS, *GEOMETRIES)


def rand_augment(example: Example, count: int, magnitude: float, rng: np.random.Generator) -> Example:
    """`count` operations drawn from OPERATIONS, each of strength `magnitude` / MAX_MAGNITUDE."""
    for name in rng.choice(OPERATIONS, count):
        example = apply_operation(example, str(name), magnitude / MAX_MAGNITUDE, 1.0 if rng.random() < 0.5 else -1.0)
    return example


def apply_operation(example: Example, name: str, strength: float, sign: float) -> Example:
    """One operation at strength 0..1; `sign` is its direction where it has two."""
    if name == "identity":
        return example
    if name in COLORS:
        recolored = COLORS[name](_to_image(example.pixels), strength, sign)
        return Example(_to_tensor(recolored), example.boxes, example.labels)
    height, width = example.pixels.shape[1:]
    return warp(example, GEOMETRIES[name](sign * strength, width, height), MIN_VISIBLE)


def warp(example: Example, matrix: np.ndarray, min_visible: float) -> Example:
    """The image and its boxes moved by a matrix [3, 3], relative to the center of the image; gray where nothing is."""
    image = _to_image(example.pixels)
    width, height = image.size
    center = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    forward = center @ matrix @ np.linalg.inv(center)
    backward = np.linalg.inv(forward)  # Pillow takes the matrix from output to input pixels
    moved = image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(backward[:2].ravel()),
        Image.Resampling.BILINEAR,
        fillcolor=(PADDING,) * 3,
    )
    boxes, keep = move_boxes(example.boxes, forward, width, height, min_visible)
    return Example(_to_tensor(moved), boxes[keep], example.labels[keep])


def move_boxes(
    boxes: np.ndarray, forward: np.ndarray, width: int, height: int, min_visible: float = MIN_VISIBLE
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes [T, 4] around the four moved corners, clipped to the image, and which of them to keep, [T] bool."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    corners = corners @ forward[:2, :2].T + forward[:2, 2]
    around = np.concatenate([corners.min(1), corners.max(1)], axis=1).reshape(-1, 4)
    visible = np.clip(around, 0, [width, height, width, height])
    keep = (area(visible) >= min_visible * area(around)) & (visible[:, 2:] - visible[:, :2] >= MIN_PIXELS).all(axis=1)
    return visible, keep


# Random erasing.

ERASED_AREA = (0.02, 0.33)  # fraction of the image's area (Zhong et al. 2020)
ERASED_ASPECT = (0.3, 3.3)  # width to height (the same)
MAX_ERASED = 0.8  # a box is dropped when a larger fraction of it is erased


def erase(example: Example, rng: np.random.Generator) -> Example:
    """A rectangle of noise; boxes that it hides are dropped (Zhong et al. 2020, "Random Erasing")."""
    _, height, width = example.pixels.shape
    fraction, aspect = rng.uniform(*ERASED_AREA), np.exp(rng.uniform(*np.log(ERASED_ASPECT)))
    h = int(np.clip(round((fraction * height * width / aspect) ** 0.5), 1, height))
    w = int(np.clip(round((fraction * height * width * aspect) ** 0.5), 1, width))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    pixels = example.pixels.clone()
    pixels[:, y : y + h, x : x + w] = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
    keep = _overlap(example.boxes, (x, y, x + w, y + h)) <= MAX_ERASED * area(example.boxes)
    return Example(pixels, example.boxes[keep], example.labels[keep])


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
