"""A target: the form in which one quantized set is written for one kind of runtime; its scales and zero points.

Both targets are symmetric with scale amax / 127. TensorRT accepts signed int8 with zero point 0 only, and under strong
typing a scale has the type of its tensor, which is FP16: there each scale is the next larger normal FP16 number. ONNX
Runtime's kernels need uint8 activations: a signed tensor is stored with zero point 128 and the same scale, a
non-negative one with zero point 0 and half the scale, which contains every level of the signed grid and those between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgedetr.artifacts import INT8, INT8_CPU, Artifact
from edgedetr.onnx_graph.hardware_limits import SMALLEST_FP16
from edgedetr.options import one_of
from edgedetr.runtime.cpu import int8_saturates

# Far above float32's smallest normal number, also when two scales are multiplied; a tensor that is always 0 gets 1.
MIN_SCALE = 1e-12


def scale_of(amax: float) -> float:
    """The scale of the signed grid: the distance of two neighboring levels."""
    return max(amax / 127, MIN_SCALE) if amax > 0 else 1.0


def fp16_scales(scale: np.ndarray) -> np.ndarray:
    """The smallest normal FP16 numbers that are at least these, as float32; at most a factor of 1.001 larger.

    Weights and activations are divided by the rounded scale, so that nothing is lost when it is stored as FP16.
    """
    wanted = np.asarray(scale, dtype=np.float32)
    near = wanted.astype(np.float16)
    near = np.where(near.astype(np.float32) < wanted, np.nextafter(near, np.float16(np.inf)), near)
    return np.maximum(near.astype(np.float32), np.float32(SMALLEST_FP16))


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of a tensor: its values are (integer - zero_point) * scale."""

    scale: np.float32
    zero_point: np.generic  # np.int8 or np.uint8


@dataclass(frozen=True)
class Target:
    """How a quantized graph is written for one kind of runtime.

    artifact          the file of a bundle that is written in this form
    uint8             activations are uint8
    quantize_outputs  outputs of convolutions and of residual sums are quantized too, for every consumer
    int32_bias        biases of convolutions are int32 with scale = input scale x weight scale
    integer_products  matrix products are two-dimensional, with int32 biases (see integer_products.py)
    fp16              everything that is not INT8 is FP16, the scales too
    weight_bits       8, or 7 where products of two neighbors would saturate 16 bits (x86 without VNNI)
    """

    artifact: Artifact
    uint8: bool
    quantize_outputs: bool
    int32_bias: bool
    integer_products: bool
    fp16: bool = False
    weight_bits: int = 8

    @property
    def name(self) -> str:
        return self.artifact.target

    def activation_params(self, amax: float, never_negative: bool) -> QuantParams:
        """Scale and zero point for a tensor with this largest magnitude."""
        scale = float(fp16_scales(np.float32(scale_of(amax)))) if self.fp16 else scale_of(amax)
        if not self.uint8:
            return QuantParams(np.float32(scale), np.int8(0))
        if never_negative:
            return QuantParams(np.float32(scale / 2), np.uint8(0))
        return QuantParams(np.float32(scale), np.uint8(128))


TENSORRT = Target(INT8, uint8=False, quantize_outputs=False, int32_bias=False, integer_products=False, fp16=True)
CPU = Target(INT8_CPU, uint8=True, quantize_outputs=True, int32_bias=True, integer_products=True)


def weight_bits(choice: str) -> int:
    """8 or 7 for "8bit" / "7bit"; "auto" is 7 on an x86 CPU without VNNI, whose 16-bit sums saturate."""
    one_of("quant.cpu_weights", choice, ("auto", "8bit", "7bit"))
    if choice != "auto":
        return int(choice[0])
    return 7 if int8_saturates() else 8
