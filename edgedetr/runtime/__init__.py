"""What runs on the device: numpy and one inference library; never torch."""

from __future__ import annotations

from edgedetr.runtime.detections import Detections
from edgedetr.runtime.detector import Detector, load

__all__ = ["Detections", "Detector", "load"]
