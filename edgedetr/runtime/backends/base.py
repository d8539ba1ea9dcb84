"""The protocol of a backend: a batch of images in, raw model outputs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

MADE_BY = "edgedetr.quantization"  # metadata of an INT8 graph: what it was made by, as JSON


@dataclass(frozen=True)
class RawOutputs:
    """logits [B, N, K*] and boxes [B, N, 4] (cx, cy, w, h in 0..1 of the input), float32."""

    logits: np.ndarray
    boxes: np.ndarray


class Runner(Protocol):
    """A loaded model.

    name            the backend's, e.g. "onnxruntime"
    batch           the only batch size it takes, or None
    height, width   of the input, pixels
    """

    name: str
    batch: int | None
    height: int
    width: int

    def run(self, images: np.ndarray) -> RawOutputs:
        """images [B, 3, height, width] float32, RGB, 0..255 -> RawOutputs."""
        ...
