"""A layer's weight in integers, with one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgedetr.quantization.target import MIN_SCALE, fp16_scales


@dataclass(frozen=True)
class QuantizedWeight:
    """values int8, of the float weight's shape; scale [O] float32 along the output-channel axis."""

    values: np.ndarray
    scale: np.ndarray


def quantize_weight(
    weight: np.ndarray,
    axis: int,
    *,
    bits: int = 8,
    bias: np.ndarray | None = None,
    data_scale: float = 1.0,
    fp16: bool = False,
) -> QuantizedWeight:
    """Symmetric, per output channel: every value lies within half a step of its level.

    weight      float32, output channels along `axis`
    bias        [O] float32 or None; a channel with tiny weights gets a scale large enough for its bias to fit int32
    data_scale  scale of the layer's input, for the same purpose
    fp16        round the scales up to FP16 numbers
    """
    limit = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float64)
    scale = np.maximum(largest / limit, MIN_SCALE)
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias) / (data_scale * 2**30))
    scale = fp16_scales(scale) if fp16 else scale.astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    values = np.clip(np.rint(weight / scale.reshape(shape)), -limit, limit).astype(np.int8)
    return QuantizedWeight(values, scale)
