"""Limits of FP16 and of TensorRT's builder that decide what is written into a graph and what lint accepts."""

from __future__ import annotations

LARGEST_FP16 = 65504.0  # the largest finite number
SMALLEST_FP16 = 2.0**-14  # 6.1e-5, the smallest normal number; GPUs may flush smaller ones to 0
LARGEST_TOP_K = 3840  # TensorRT's builder: "K exceeds the maximum value allowed (3840)"
# Model Optimizer leaves smaller integer products float: with fewer inputs or outputs they are slower than FP16.
SMALLEST_INT8_PRODUCT = 16
# An INT8 convolution with fewer channels on one side is filled up to 32 there, and a tensor of 1, 2 or 4 channels is
# converted on its way in and out; Model Optimizer leaves such ones float, too. The 3 channels of an image have kernels.
SMALLEST_INT8_CHANNELS = 8
IMAGE_CHANNELS = 3


def is_narrow(inputs: int, outputs: int) -> bool:
    """Whether a convolution has too few channels for INT8."""
    return outputs < SMALLEST_INT8_CHANNELS or (inputs < SMALLEST_INT8_CHANNELS and inputs != IMAGE_CHANNELS)
