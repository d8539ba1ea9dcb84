"""Boxes as numpy arrays: formats, areas, overlap. Origin top-left, x to the right, y downwards."""

from __future__ import annotations

import numpy as np


def cxcywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Corners of boxes given by center and size.

    boxes   [..., 4]  cx, cy, w, h in any one unit
    return  [..., 4]  x0, y0, x1, y1 in that unit, y downwards
    """
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([center - half, center + half], axis=-1)


def xyxy_to_cxcywh(boxes: np.ndarray) -> np.ndarray:
    """Center and size of boxes given by corners.

    boxes   [..., 4]  x0, y0, x1, y1 in any one unit
    return  [..., 4]  cx, cy, w, h in that unit
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=-1)


def area(boxes: np.ndarray) -> np.ndarray:
    """Area of xyxy boxes [..., 4] -> [...]; an inside-out box has area 0."""
    size = np.clip(boxes[..., 2:] - boxes[..., :2], 0, None)
    return size[..., 0] * size[..., 1]


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair; a pair without area overlaps by 0.

    a       [N, 4]  xyxy
    b       [M, 4]  xyxy in the same unit
    return  [N, M]  in [0, 1]
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = area(a)[:, None] + area(b)[None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def clip(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """xyxy boxes [..., 4] cut to the image, 0..width and 0..height."""
    limit = np.array([width, height, width, height], dtype=boxes.dtype)
    return np.clip(boxes, 0, limit)


def around_turned(boxes: np.ndarray, degrees: float) -> np.ndarray:
    """The upright boxes around xyxy boxes [..., 4] that are turned about their centers -> [..., 4] xyxy."""
    cos, sin = abs(np.cos(np.radians(degrees))), abs(np.sin(np.radians(degrees)))
    low, high = boxes[..., :2], boxes[..., 2:]
    center, half = (low + high) / 2, (high - low) / 2
    half = half * cos + half[..., ::-1] * sin
    return np.concatenate([center - half, center + half], axis=-1)
