"""The GPU, its driver and CUDA runtime, and TensorRT's Python package: probed before anything else of them is used.

TensorRT is imported when it is first needed: JetPack has it, most machines do not. No CUDA package for Python is used:
the driver's libcuda describes the device. Only the first visible device is used (CUDA_VISIBLE_DEVICES selects it).
"""

from __future__ import annotations

import ctypes
import logging
import site
import sys
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_size_t, c_uint
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgedetr.errors import DeviceError, MissingDependency

log = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
RUNTIMES = {13: "libcudart.so.13", 12: "libcudart.so.12", 11: "libcudart.so.11.0"}  # as CUDA 11 names it
DOCTOR = "run: edgedetr doctor"
# enum CUdevice_attribute
INTEGRATED, MAJOR, MINOR = 18, 75, 76
NEEDED = (
    "on a Jetson: sudo apt install python3-libnvinfer, and make the environment with "
    "python3 -m venv --system-site-packages; on x86 with an NVIDIA GPU: pip install tensorrt"
)


@dataclass(frozen=True)
class Device:
    """The GPU.

    sm            compute capability as one number: 87 for 8.7
    total_bytes   its memory; on an integrated device, what it shares with the CPU
    integrated    whether it shares memory with the CPU (Jetson)
    driver        newest CUDA version that the driver runs, "12.6"
    runtime       CUDA version of libcudart, "12.6"
    """

    name: str
    sm: int
    total_bytes: int
    integrated: bool
    driver: str
    runtime: str


def probe() -> Device:
    """Describe the GPU. Errors: DeviceError where there is no driver, no device or no libcudart.

    It creates no CUDA context and must be called first: TensorRT's Runtime ends the process where there is no driver.
    """
    library = _open([DRIVER])
    if library is None:
        raise DeviceError(
            f"no NVIDIA driver: {DRIVER} is not installed; expected a machine with an NVIDIA GPU; {DOCTOR}"
        )
    text = c_char_p()

    def call(name: str, *arguments: object) -> None:
        code = getattr(library, name)(*arguments)
        if code:
            library.cuGetErrorString(c_int(code), ctypes.byref(text))
            message = text.value.decode() if text.value else "no text"
            raise DeviceError(f"the NVIDIA driver does not work: {name} returned {code} ({message}); {DOCTOR}")

    count, device, value, total = c_int(), c_int(), c_int(), c_size_t()
    name = ctypes.create_string_buffer(256)
    call("cuInit", c_uint(0))
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise DeviceError(f"the NVIDIA driver sees no device; expected one (is CUDA_VISIBLE_DEVICES empty?); {DOCTOR}")
    call("cuDriverGetVersion", ctypes.byref(value))
    driver = _version(value.value)
    call("cuDeviceGet", ctypes.byref(device), c_int(0))
    call("cuDeviceGetName", name, c_int(len(name)), device)
    call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
    facts = {}
    for attribute in (INTEGRATED, MAJOR, MINOR):
        call("cuDeviceGetAttribute", ctypes.byref(value), c_int(attribute), device)
        facts[attribute] = value.value
    return Device(
        name.value.decode(errors="replace"),
        10 * facts[MAJOR] + facts[MINOR],
        total.value,
        bool(facts[INTEGRATED]),
        driver,
        runtime_version(int(driver.partition(".")[0])),
    )


def runtime_version(driver_major: int) -> str:
    """Version of the newest libcudart that the driver supports. Errors: DeviceError where there is none."""
    value = c_int()
    code = load_cudart(driver_major).cudaRuntimeGetVersion(ctypes.byref(value))
    if code:
        raise DeviceError(f"libcudart does not work: cudaRuntimeGetVersion returned {code}; {DOCTOR}")
    return _version(value.value)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"  # 12060 is 12.6


@lru_cache(maxsize=4)
def load_cudart(driver_major: int) -> ctypes.CDLL:
    """The newest libcudart that this driver supports: with a newer major version, every call fails."""
    names = [name for major, name in RUNTIMES.items() if major <= driver_major]
    library = _open([path for name in names for path in (name, *_other_paths(name))])
    if library is None:
        raise DeviceError(
            f"no libcudart for this driver (CUDA {driver_major}): looked for {', '.join(names)}; on a "
            f"Jetson run: sudo apt install nvidia-jetpack; elsewhere: "
            f"pip install nvidia-cuda-runtime{'-cu12' if driver_major < 13 else ''}"
        )
    return library


def _other_paths(name: str) -> list[str]:
    """Paths of a library in NVIDIA's wheels and in the toolkit, where the loader does not search."""
    folders = [Path(entry) for entry in dict.fromkeys([*sys.path, *site.getsitepackages()]) if entry]
    found = [str(path) for folder in folders for path in sorted(folder.glob(f"nvidia/*/lib/{name}"))]
    return [*found, f"/usr/local/cuda/lib64/{name}"]


def _open(names: Sequence[str]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def tensorrt() -> Any:
    """The module `tensorrt`. Errors: MissingDependency with the way to install it."""
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise MissingDependency(f"TensorRT is not installed here ({error}); {NEEDED}") from error
    except (
        ImportError,
        OSError,
    ) as error:  # a library that it needs is missing, such as libnvdla_compiler.so in containers
        raise MissingDependency(f"TensorRT is installed but cannot be loaded ({error}); {NEEDED}") from error
    if not hasattr(trt, "Runtime"):
        raise MissingDependency(f"the Python package 'tensorrt' that was found is not NVIDIA's; {NEEDED}")
    return trt


def why_unavailable() -> str:
    """Why no engine can be built or run here; an empty text where it can."""
    try:
        tensorrt()
        probe()
    except (MissingDependency, DeviceError) as reason:
        return str(reason)
    return ""


def version(text: str) -> tuple[int, ...]:
    """`10.16.1.11` -> (10, 16, 1, 11); the first part that is no number ends it."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def make_logger(trt: Any) -> Any:
    """A logger for TensorRT that passes every message to `logging`; its `errors` are the error messages so far.

    It must outlive every object that was created with it.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
    }

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                self.errors.append(msg.strip())
            log.log(min(level, logging.INFO), "TensorRT: %s", msg)  # important messages reach the user in exceptions

    return Log()
