"""OpenVINO on the CPU: the fastest INT8 on x86, compared with the reference run before it is trusted."""

from __future__ import annotations

import functools
import queue
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.artifacts import INT8, OPENVINO, QUANTIZERS
from edgedetr.errors import BundleError, MissingDependency
from edgedetr.packages import missing
from edgedetr.runtime.backends.base import Backend, RawOutputs, weight_bits
from edgedetr.runtime.cpu import bounded
from edgedetr.runtime.kernels import PRODUCT, Kernel
from edgedetr.runtime.onnx_bytes import metadata, read, require_whole
from edgedetr.telemetry import import_openvino


class OpenVinoRunner:
    """An ONNX file compiled for the CPU, one image at a time where the graph leaves the batch open.

    threads          threads of one inference; None = all cores
    precision_hint   "f32", or "bf16" on CPUs that have it (OpenVINO's own default there, which costs accuracy)
    """

    name = "openvino"

    def __init__(self, path: str | Path, *, threads: int | None = None, precision_hint: str = "f32") -> None:
        data = read(path)[0]
        compiled = _compile(data, threads, precision_hint, what=str(path))
        names = [port.get_any_name() for port in compiled.inputs], {n for port in compiled.outputs for n in port.names}
        if names[0] != ["images"] or not {"logits", "boxes"} <= names[1] or len(compiled.inputs[0].shape) != 4:
            raise BundleError(
                f"{path}: inputs {names[0]} and outputs {sorted(names[1])}; expected "
                f"images [B, 3, H, W] -> logits, boxes, as edgedetr export writes them"
            )
        shape = compiled.inputs[0].shape
        self.batch: int | None = int(shape[0])
        self.height, self.width = int(shape[2]), int(shape[3])
        self.weight_bits = weight_bits(metadata(data, str(path)))
        self._compiled = compiled
        # Requests that no thread is using. A request owns its buffers, so two threads must not share one.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, images: np.ndarray) -> RawOutputs:
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            request.infer({"images": images})
            # Copies, because the next run overwrites the buffers of the request.
            logits, boxes = (np.array(request.get_tensor(name).data) for name in ("logits", "boxes"))
        finally:
            self._idle.put(request)
        return RawOutputs(logits, boxes)


def tensors(
    model: bytes, images: np.ndarray, names: Collection[str], *, threads: int | None = None
) -> dict[str, np.ndarray]:
    """Values of named graph outputs of a serialized model, for one batch."""
    request = _compile(require_whole(model), threads, "f32", batch=len(images)).create_infer_request()
    request.infer({"images": images})
    return {name: np.array(request.get_tensor(name).data) for name in names}


def kernels(model: bytes, *, threads: int | None = None) -> list[Kernel]:
    """The convolutions and matrix products of the graph that OpenVINO has compiled this one to."""
    found = []
    for node in _compile(require_whole(model), threads, "f32").get_runtime_model().get_ops():
        about = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        operator = about.get("layerType", "")
        if PRODUCT.search(operator):
            names = about.get("originalLayersNames", "").split(",")
            names = [name.removesuffix("/WithoutBiases").removesuffix("/DequantizationMultiply") for name in names]
            integers = about.get("runtimePrecision", "") in ("i8", "u8")
            found.append(Kernel(operator, integers, frozenset(filter(None, names))))
    return found


SATURATES = (INT8.id, *(graph.id for graph in QUANTIZERS.values()))
BACKEND = Backend(OPENVINO, "openvino", OpenVinoRunner, saturates=SATURATES, tensors=tensors, kernels=kernels)


@functools.cache
def _core() -> Any:
    """The only Core of this process; it is never destroyed.

    The CPU plugin of each Core installs a signal stack in the thread, and restores the previous one when the Core is
    destroyed. Of two Cores that are destroyed in the order of their creation, the second restores the first one's
    stack, whose memory is freed (OpenVINO 2026.4): the next signal that Python handles, Ctrl-C or the end of a child
    process, then kills the process without a message.
    """
    return import_openvino().Core()


def compile_profiled(model: bytes, threads: int | None = None) -> Any:
    """The compiled model of a serialized graph, whose requests tell the time of each kernel of their last run."""
    return _compile(require_whole(model), threads, "f32", settings={"PERF_COUNT": True})


def _compile(
    model: bytes,
    threads: int | None,
    precision_hint: str,
    batch: int = 1,
    what: str = "the graph",
    settings: Mapping[str, object] | None = None,
) -> Any:
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise MissingDependency(missing("openvino", error)) from error
    settings = {"INFERENCE_PRECISION_HINT": precision_hint, "PERFORMANCE_HINT": "LATENCY", **(settings or {})}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = bounded(threads)
    core = _core()
    try:
        graph = core.read_model(model)
        shape = graph.inputs[0].partial_shape
        if shape.rank.is_static and len(shape) == 4 and shape[0].is_dynamic:
            graph.reshape({graph.inputs[0].get_any_name(): openvino.PartialShape([batch, *list(shape)[1:]])})
        return core.compile_model(graph, "CPU", settings)
    except RuntimeError as error:
        raise BundleError(
            f"{what}: OpenVINO {openvino.__version__} cannot compile it ({str(error).strip()[-300:]}); "
            f"use another backend, or write it again with: edgedetr export"
        ) from error
