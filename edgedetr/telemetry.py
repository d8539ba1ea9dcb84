"""Switches off the telemetry of the libraries that edgedetr loads; EDGEDETR_TELEMETRY=1 allows it.

ONNX Runtime (1.30 and later) sends names of models and graphs, a device number and texts of errors, and keeps a
database in the user's cache. OpenVINO and NNCF contact an analytics host when they are imported. All decide this during
their import, so the switches are set before it.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import MutableMapping
from types import ModuleType
from typing import Any

VARIABLE = "EDGEDETR_TELEMETRY"
# Set where the user has not set them; Hugging Face's hub reads the second one.
SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
OPENVINO_REPORTS = "openvino_telemetry"  # an optional package; without it, OpenVINO has a stub that does nothing

_lock = threading.Lock()


def allowed() -> bool:
    """Whether the user allows telemetry."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")


def switch_off() -> None:
    """Set the variables that the libraries read when they are imported; child processes inherit them."""
    if not allowed():
        for name, value in SWITCHES.items():
            os.environ.setdefault(name, value)


def import_openvino() -> ModuleType:
    """The module openvino, imported without its telemetry package; ImportError where openvino is not installed."""
    return _without_openvino_telemetry("openvino")


def import_nncf() -> ModuleType:
    """The module nncf, imported without the telemetry package of OpenVINO; ImportError where it is not installed."""
    return _without_openvino_telemetry("nncf")


def _without_openvino_telemetry(name: str) -> ModuleType:
    with _lock:
        if allowed() or name in sys.modules:
            return importlib.import_module(name)
        modules: MutableMapping[str, Any] = sys.modules
        missing = object()
        before = modules.get(OPENVINO_REPORTS, missing)
        modules[OPENVINO_REPORTS] = None  # its import now raises ImportError, as documented
        try:
            return importlib.import_module(name)
        finally:
            del modules[OPENVINO_REPORTS]
            if before is not missing:
                modules[OPENVINO_REPORTS] = before


def import_onnxruntime() -> ModuleType:
    """The module onnxruntime, without telemetry even if it was imported before edgedetr."""
    with _lock:
        early = "onnxruntime" in sys.modules
        module = importlib.import_module("onnxruntime")
        if early and not allowed() and hasattr(module, "disable_telemetry_events"):
            module.disable_telemetry_events()
        return module
