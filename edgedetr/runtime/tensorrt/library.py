"""TensorRT's Python package, imported when it is first needed: JetPack brings it, most machines do not have it."""

from __future__ import annotations

import logging
from typing import Any

from edgedetr.errors import DeviceError, MissingDependency
from edgedetr.runtime.tensorrt import cudart

log = logging.getLogger(__name__)

NEEDED = (
    "on a Jetson: sudo apt install python3-libnvinfer, and make the environment with "
    "python3 -m venv --system-site-packages; on x86 with an NVIDIA GPU: pip install tensorrt"
)


def tensorrt() -> Any:
    """The module `tensorrt`; MissingDependency says where it comes from when it cannot be imported."""
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise MissingDependency(f"TensorRT is not installed here ({error}); {NEEDED}") from error
    except (ImportError, OSError) as error:  # a library beside it is missing, as libnvdla_compiler.so in containers
        raise MissingDependency(f"TensorRT is installed but cannot be loaded ({error}); {NEEDED}") from error
    if not hasattr(trt, "Runtime"):
        raise MissingDependency(f"the Python package 'tensorrt' that was found is not NVIDIA's; {NEEDED}")
    return trt


def why_unavailable() -> str:
    """Why no engine can be built or run here; an empty text where it can."""
    try:
        tensorrt()
        cudart.probe()
    except (MissingDependency, DeviceError) as reason:
        return str(reason)
    return ""


def version(text: str) -> tuple[int, ...]:
    """`10.16.1.11` -> (10, 16, 1, 11); a suffix that is no number ends it."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def make_logger(trt: Any) -> Any:
    """A logger for TensorRT that hands every message to `logging`; its `errors` are the error texts so far.

    It must outlive everything that was made with it.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
    }

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                self.errors.append(msg.strip())
            log.log(min(level, logging.INFO), "TensorRT: %s", msg)  # what matters reaches the user as an error

    return Log()
