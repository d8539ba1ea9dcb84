"""What runs on the device: numpy and one inference library; never torch."""

from __future__ import annotations

from edgedetr.runtime.bundle_detector import Detector, load
from edgedetr.runtime.detections import Detections

__all__ = ["Detections", "Detector", "load"]
