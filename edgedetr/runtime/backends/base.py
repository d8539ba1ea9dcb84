"""What a backend is, and the registry of backends: the inference libraries that can run a bundle.

A new backend is three files: a module in this folder with a `BACKEND` record, its name and its artifacts in the table
of edgedetr/artifacts.py, and a test. The module of "some-name" is some_name.py. Nothing else lists backends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedetr.artifacts import BACKENDS
from edgedetr.errors import BundleError, UsageError, did_you_mean
from edgedetr.packages import missing
from edgedetr.runtime.kernels import Kernel
from edgedetr.storage.reading import parse_json

# Metadata key of an INT8 or FP16 graph: the settings that it was made with, as JSON. Spelled as in files of 0.1.
MADE_BY = "edgedetr.quantisation"
# Metadata key of a graph that another quantizer made: its package and version, and whether TensorRT takes the graph.
PEER_NOTE = "edgedetr.peer"


def weight_bits(metadata: Mapping[str, str]) -> int | None:
    """Bits of an INT8 graph's weights, 8 or 7, from its metadata; None where edgedetr did not quantize the graph."""
    try:
        bits = parse_json(metadata[MADE_BY], MADE_BY, BundleError)["weight_bits"]
    except (BundleError, KeyError, TypeError):
        return None
    return bits if isinstance(bits, int) else None


@dataclass(frozen=True)
class RawOutputs:
    """logits [B, N, K*] and boxes [B, N, 4] (cx, cy, w, h in 0..1 of the input), float32."""

    logits: np.ndarray
    boxes: np.ndarray


class Runner(Protocol):
    """A loaded model.

    name            the backend's, e.g. "onnxruntime"
    batch           the only batch size it takes, or None
    height, width   of the input, pixels
    """

    name: str
    batch: int | None
    height: int
    width: int

    def run(self, images: np.ndarray) -> RawOutputs:
        """images [B, 3, height, width] float32, RGB, 0..255 -> RawOutputs."""
        ...


class OpenRunner(Protocol):
    """Opens an ONNX file of a bundle, or an engine."""

    def __call__(self, path: str | Path, *, threads: int | None = None) -> Runner: ...


class ReadTensors(Protocol):
    """Runs a serialized model and returns the values of the graph tensors called `names`, which are outputs of it."""

    def __call__(
        self, model: bytes, images: np.ndarray, names: Collection[str], *, threads: int | None = None
    ) -> dict[str, np.ndarray]: ...


class ReadKernels(Protocol):
    """Loads a serialized model as `open` does, and lists the convolutions and matrix products that the library runs."""

    def __call__(self, model: bytes, *, threads: int | None = None) -> list[Kernel]: ...


class CheckLibrary(Protocol):
    """Why a backend cannot run here, with the command that helps; an empty text where it can."""

    def __call__(self) -> str: ...


@dataclass(frozen=True)
class Backend:
    """One inference library on one kind of device.

    name               what users type: --backend openvino
    library            the Python package to import
    open               opens an artifact
    device             "cpu" or "cuda"
    caveat             for a warning about artifacts that it does not compute as they are written (which ones: see
                       artifacts.py); empty: nothing is known
    saturates          artifacts whose sums of 8-bit products saturate on a CPU without an 8-bit dot product
    is_reference       it can run every node as it is written; FP16 is simulated in it, the others are compared with it
    runs_engines       it runs engines that were built on this device, and no ONNX file
    tensors            reads any tensor of a graph, for the search for the first divergence; None: it cannot
    kernels            lists what it runs a graph as, to tell integers from floats; None: it cannot
    why_float          {operator of a kernel: why a quantized layer became this float kernel}, where that is known
    why_unavailable    None: the library is importable or not
    """

    name: str
    library: str
    open: OpenRunner
    device: str = "cpu"
    caveat: str = ""
    saturates: tuple[str, ...] = ()
    is_reference: bool = False
    runs_engines: bool = False
    tensors: ReadTensors | None = None
    kernels: ReadKernels | None = None
    why_float: Mapping[str, str] = field(default_factory=dict)
    why_unavailable: CheckLibrary | None = None

    def unavailable(self) -> str:
        """Why it cannot run here, with the command that helps; an empty text where it can."""
        if self.why_unavailable is not None:
            return self.why_unavailable()
        return "" if find_spec(self.library) else missing(self.library)


def run_in_batches(
    run: Callable[[np.ndarray], RawOutputs], images: np.ndarray, fixed: int | None, largest: int | None = None
) -> RawOutputs:
    """Run any number of images on a model that takes only certain batch sizes.

    run       one run of the model
    images    [B, 3, height, width], B at least 1
    fixed     the only batch size of the model, or None; a smaller last batch is padded with its last image, and the
              outputs of the padding are cut off
    largest   the largest batch where the size is open; None: any
    """
    step = fixed or largest or len(images)
    outputs = []
    for start in range(0, len(images), step):
        part = images[start : start + step]
        padding = fixed - len(part) if fixed else 0
        raw = run(np.concatenate([part, np.repeat(part[-1:], padding, axis=0)]) if padding else part)
        outputs.append(RawOutputs(raw.logits[: len(part)], raw.boxes[: len(part)]) if padding else raw)
    if len(outputs) == 1:
        return outputs[0]
    return RawOutputs(np.concatenate([raw.logits for raw in outputs]), np.concatenate([raw.boxes for raw in outputs]))


def get(name: str) -> Backend:
    """The backend of this name; imports its module, and not its library. Errors: UsageError for an unknown name."""
    if name not in BACKENDS:
        raise UsageError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}")
    module: Any = import_module(f"edgedetr.runtime.backends.{name.replace('-', '_')}")
    backend: Backend = module.BACKEND
    return backend


def backends() -> Iterator[Backend]:
    """All backends, the preferred ones first."""
    return map(get, BACKENDS)


def reference() -> Backend:
    """The backend that the others are compared with."""
    return next(backend for backend in backends() if backend.is_reference)
