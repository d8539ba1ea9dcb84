"""Limits of FP16 and of TensorRT's builder that decide what is written into a graph and what lint accepts."""

from __future__ import annotations

LARGEST_FP16 = 65504.0  # the largest finite number
SMALLEST_FP16 = 2.0**-14  # 6.1e-5, the smallest normal number; GPUs may flush smaller ones to 0
LARGEST_TOP_K = 3840  # TensorRT's builder: "K exceeds the maximum value allowed (3840)"
# Model Optimizer leaves smaller integer products float: with fewer inputs or outputs they are slower than FP16.
SMALLEST_INT8_PRODUCT = 16
