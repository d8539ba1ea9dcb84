"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider: FP16 is computed as FP16, and float32 never as TF32."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.artifacts import ORT_CUDA
from edgedetr.errors import DeviceError
from edgedetr.runtime.backends import onnxruntime
from edgedetr.runtime.backends.base import Backend
from edgedetr.runtime.backends.onnxruntime import CPU, OrtRunner, open_session
from edgedetr.runtime.kernels import Kernel
from edgedetr.runtime.tensorrt.cudart import probe
from edgedetr.telemetry import import_onnxruntime

CUDA = "CUDAExecutionProvider"


class OrtCudaRunner(OrtRunner):
    """As OrtRunner, on the GPU. Operators without a CUDA kernel run on the CPU, with `threads`.

    Errors: DeviceError where the whole graph would run on the CPU.
    """

    name = "onnxruntime-cuda"

    def _open(self, path: str | Path | bytes, threads: int | None, optimize: bool) -> Any:
        return _session(path, threads, optimize)


def no_gpu() -> str:
    """Why ONNX Runtime cannot use a GPU here, with the command that helps; an empty text where it can."""
    try:
        library = import_onnxruntime()
        probe()
    except ImportError:
        return "onnxruntime is not installed; run: pip install onnxruntime-gpu"
    except DeviceError as reason:
        return str(reason)
    if CUDA not in library.get_available_providers():
        return (
            f"ONNX Runtime {library.__version__} here has no {CUDA}; run: pip uninstall -y onnxruntime && "
            "pip install onnxruntime-gpu"
        )
    return ""


def tensors(
    model: bytes, images: np.ndarray, names: Collection[str], *, threads: int | None = None
) -> dict[str, np.ndarray]:
    """Values of named graph outputs of a serialized model, for one batch."""
    return dict(zip(names, _session(model, threads, True).run(list(names), {"images": images})))


def kernels(model: bytes, *, threads: int | None = None) -> list[Kernel]:
    """The convolutions and matrix products of the graph that ONNX Runtime has made of this one for the GPU."""
    return onnxruntime.kernels(model, threads=threads, open_with=_session)


def _session(model: str | Path | bytes, threads: int | None, optimize: bool, *, optimized: Path | None = None) -> Any:
    library = onnxruntime.library()
    if reason := no_gpu():
        raise DeviceError(reason)
    if hasattr(library, "preload_dlls"):  # since 1.21: finds CUDA and cuDNN in NVIDIA's wheels
        with redirect_stdout(sys.stderr):  # it prints the names of libraries that it does not find
            library.preload_dlls()
    providers = [(CUDA, {"use_tf32": "0"}), CPU]
    session = open_session(model, threads, optimize, providers, optimized=optimized)
    if CUDA not in session.get_providers():  # ONNX Runtime reports this on standard error only, and goes on
        raise DeviceError(
            f"ONNX Runtime {library.__version__} cannot load its {CUDA} and would run on the CPU; "
            "expected the CUDA and cuDNN that it was built for; run: "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session


BACKEND = Backend(
    ORT_CUDA,
    "onnxruntime",
    OrtCudaRunner,
    device="cuda",
    caveat="does not compute quantized graphs as they are written (AP 3.0 instead of 59.2 was seen, ONNX Runtime "
    "1.31.1); take stage onnx or fp16, or build an engine: edgedetr build {bundle}",
    tensors=tensors,
    kernels=kernels,
    why_unavailable=no_gpu,
)
