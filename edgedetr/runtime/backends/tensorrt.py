"""TensorRT runs engines that were built on this device; runtime/tensorrt/ builds, checks, selects and runs them."""

from __future__ import annotations

from edgedetr.artifacts import TENSORRT
from edgedetr.runtime.backends.base import Backend
from edgedetr.runtime.tensorrt.gpu import why_unavailable
from edgedetr.runtime.tensorrt.trt_runner import TrtRunner

BACKEND = Backend(TENSORRT, "tensorrt", TrtRunner, device="cuda", runs_engines=True, why_unavailable=why_unavailable)
