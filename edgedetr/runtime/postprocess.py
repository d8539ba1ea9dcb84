"""Detections of an image, and how a model's logits and boxes become detections in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgedetr import boxes as box
from edgedetr.bundle import ClassInfo, OutputContract
from edgedetr.errors import BundleError, ModelError
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.preprocess import Geometry


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, most confident first.

    xyxy         [n, 4]  float32, corners in pixels of the original (EXIF-upright) image
    confidence   [n]     float32, 0..1
    class_id     [n]     int64, contiguous class index
    data                 "class_name" [n] str, "category_id" [n] int64 (the data set's own id)

    `supervision.Detections(xyxy=d.xyxy, confidence=d.confidence, class_id=d.class_id, data=d.data)` converts it.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    data: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.xyxy)

    def above(self, confidence: float) -> Detections:
        """The detections with at least this confidence."""
        keep = self.confidence >= confidence
        return Detections(
            self.xyxy[keep],
            self.confidence[keep],
            self.class_id[keep],
            {name: values[keep] for name, values in self.data.items()},
        )


def decode(
    raw: RawOutputs, geometries: Sequence[Geometry], classes: Sequence[ClassInfo], output: OutputContract
) -> list[Detections]:
    """Detections of each image of a batch, most confident first, boxes clipped to the image.

    raw          logits [B, N, K] for sigmoid or [B, N, K+1] for softmax (last = no object), boxes [B, N, 4]
    geometries   how each of the B images was fitted into the input
    """
    width = len(classes) + (output.activation == "softmax")
    if raw.logits.ndim and raw.logits.shape[-1] != width:
        raise BundleError(
            f"the graph gives {raw.logits.shape[-1]} logits per query, expected {width} for "
            f"{len(classes)} classes and {output.activation}; run: edgedetr export BUNDLE"
        )
    numbers = raw.logits.dtype.kind in "fiu" and raw.boxes.dtype.kind in "fiu"
    if (
        raw.logits.ndim != 3
        or raw.boxes.shape != (*raw.logits.shape[:2], 4)
        or not numbers
        or len(geometries) != len(raw.logits)
    ):
        raise BundleError(
            f"the graph gives logits {raw.logits.dtype} {list(raw.logits.shape)} and boxes "
            f"{raw.boxes.dtype} {list(raw.boxes.shape)} for {len(geometries)} images; expected numbers "
            f"[B, N, {width}] and [B, N, 4]; run: edgedetr export BUNDLE"
        )
    if not (np.isfinite(raw.logits).all() and np.isfinite(raw.boxes).all()):
        raise ModelError("the model gave NaN or infinity; run: edgedetr verify BUNDLE to see which artifact does")
    select = {"sigmoid": _best_of_all, "softmax": _best_class_per_query}[output.activation]
    found = []
    for logits, boxes, geometry in zip(raw.logits, raw.boxes, geometries):
        query, class_id, confidence = select(logits.astype(np.float32, copy=False), output.top_k)
        corners = box.cxcywh_to_xyxy(boxes[query].astype(np.float64))
        scale = np.array([geometry.width, geometry.height] * 2)
        corners = box.clip(geometry.to_source(corners * scale), geometry.source_height, geometry.source_width)
        found.append(named(corners.astype(np.float32), confidence, class_id, classes))
    return found


def named(xyxy: np.ndarray, confidence: np.ndarray, class_id: np.ndarray, classes: Sequence[ClassInfo]) -> Detections:
    """Detections with class names and original category ids. Errors: BundleError for an unknown class."""
    if class_id.size and not 0 <= int(class_id.min()) <= int(class_id.max()) < len(classes):
        raise BundleError(
            f"the graph gives classes {int(class_id.min())} to {int(class_id.max())}, and the bundle has "
            f"{len(classes)}; run: edgedetr export BUNDLE"
        )
    names = np.array([c.name for c in classes], dtype=str)
    ids = np.array([c.category_id for c in classes], dtype=np.int64)
    return Detections(xyxy, confidence, class_id, {"class_name": names[class_id], "category_id": ids[class_id]})


def _best_of_all(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The top_k best of N * K sigmoid scores: query [n], class [n], confidence [n]; a query may appear twice."""
    flat = logits.reshape(-1)
    best = _top(flat, top_k)
    # exp of the negative absolute value never overflows
    small = np.exp(-np.abs(flat[best]))
    confidence = np.where(flat[best] >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    return best // logits.shape[1], (best % logits.shape[1]).astype(np.int64), confidence


def _best_class_per_query(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best class other than "no object" of each query by softmax, the top_k most confident queries first."""
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability = (exponent / exponent.sum(axis=1, keepdims=True))[:, :-1]
    class_id = probability.argmax(axis=1)
    confidence = probability[np.arange(len(probability)), class_id]
    best = _top(confidence, top_k)
    return best, class_id[best].astype(np.int64), confidence[best].astype(np.float32)


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of scores [n], largest first; equal scores keep their order."""
    return np.argsort(-scores, kind="stable")[:k]
