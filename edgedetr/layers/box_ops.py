"""Boxes as tensors: forms, overlaps and the inverse sigmoid. Origin top-left, x to the right, y downwards."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Center and size [..., 4] (cx, cy, w, h) -> corners [..., 4] (x0, y0, x1, y1), in the same unit."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x, finite at 0 and 1: log(max(x, eps) / max(1 - x, eps)) of x clamped to [0, 1]."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes [..., 4] -> [...]; an inside-out box has area 0."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of a[i] with b[i]; xyxy boxes [..., 4] that broadcast -> [...]."""
    overlap, union = _overlap_union(a, b)
    return overlap / union.clamp(min=_tiny(union))


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al. 2019) of a[i] with b[i], in [-1, 1]; finite for boxes without area.

    a, b    [..., 4]  xyxy, broadcast against each other
    return  [...]
    """
    overlap, union = _overlap_union(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    enclosing = (hull[..., 0] * hull[..., 1]).clamp(min=_tiny(union))
    return overlap / union.clamp(min=_tiny(union)) - (enclosing - union) / enclosing


def _overlap_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = size[..., 0] * size[..., 1]
    return overlap, area(a) + area(b) - overlap


def _tiny(x: Tensor) -> float:
    # Far below the area of any real box (1e-3 of an image's side squared), far above underflow.
    return max(1e-12, torch.finfo(x.dtype).tiny)
