"""What runs on the device: numpy and one inference library; never torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedetr.runtime.bundle_detector import Detector, load
    from edgedetr.runtime.postprocess import Detections

__all__ = ["Detections", "Detector", "load"]

# Imported on first use, so that `edgedetr --help` does not import numpy.
HOME = {"Detections": "postprocess", "Detector": "bundle_detector", "load": "bundle_detector"}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)
