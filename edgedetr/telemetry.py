"""No library that we load reports to its maker, unless the user says so: EDGEDETR_TELEMETRY=1.

ONNX Runtime (1.30 and later) sends names of models and graphs, a device number and texts of errors, and keeps a
database in the user's cache. OpenVINO tells an analytics host that it was imported. Both decide while they are
imported, so both are told before.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from types import ModuleType

VARIABLE = "EDGEDETR_TELEMETRY"
# What is set where the user has not set it; Hugging Face's hub reads the second.
SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
OPENVINO_REPORTS = "openvino_telemetry"  # an optional package; without it, OpenVINO has a stub that does nothing

_lock = threading.Lock()


def allowed() -> bool:
    """Whether the user wants the libraries to report."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")


def switch_off() -> None:
    """Set the variables that the libraries read when they are imported; child processes inherit them."""
    if not allowed():
        for name, value in SWITCHES.items():
            os.environ.setdefault(name, value)


def import_openvino() -> ModuleType:
    """The module openvino, imported without the package that reports; ImportError where it is not installed."""
    with _lock:
        if allowed() or "openvino" in sys.modules:
            return importlib.import_module("openvino")
        missing = object()
        before = sys.modules.get(OPENVINO_REPORTS, missing)
        sys.modules[OPENVINO_REPORTS] = None  # type: ignore[assignment]  # documented: its import raises ImportError
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules[OPENVINO_REPORTS]
            if before is not missing:
                sys.modules[OPENVINO_REPORTS] = before  # type: ignore[assignment]  # a module, as it was found


def import_onnxruntime() -> ModuleType:
    """The module onnxruntime, which reports nothing even where something else had imported it before edgedetr."""
    with _lock:
        early = "onnxruntime" in sys.modules
        module = importlib.import_module("onnxruntime")
        if early and not allowed() and hasattr(module, "disable_telemetry_events"):
            module.disable_telemetry_events()
        return module
