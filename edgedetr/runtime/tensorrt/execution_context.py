"""An execution context slot: what one thread needs to run an engine (context, stream, fixed buffers, CUDA graph).

Two threads must not use one context, and a CUDA graph contains the addresses that it was recorded with. So each slot
has both, and its buffers keep their addresses until it is closed.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedetr.errors import DeviceError, EngineError, UsageError
from edgedetr.runtime.tensorrt.cudart import CaptureError, Cuda

log = logging.getLogger(__name__)

LEGACY_STREAM = 1  # handle of the default stream, which producers use that name no stream


@dataclass(frozen=True)
class IoTensor:
    """An input or output of an engine. `shape` has -1 for a dynamic size; `largest` is the maximum of the profile."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    largest: tuple[int, ...]
    is_input: bool


class Buffer:
    """Memory that the CPU accesses as `array` and the device at `address`.

    Where CPU and GPU share memory (Jetson), it is one allocation, mapped and cached for both, without copies. Elsewhere
    there are two: page-locked on the host, and on the device.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.cuda, self.shared = cuda, cuda.device.integrated
        self.nbytes = max(1, nbytes)
        self.host = cuda.allocate_host(self.nbytes)
        try:
            self.address = cuda.device_address(self.host) if self.shared else cuda.allocate(self.nbytes)
        except DeviceError:
            cuda.release_host(self.host)
            raise

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The host memory as an array; valid until `free`."""
        count = math.prod(shape)
        memory = memoryview((ctypes.c_char * self.nbytes).from_address(self.host))
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def upload(self, stream: int, nbytes: int) -> None:
        if not self.shared:
            self.cuda.copy(self.address, self.host, nbytes, stream)

    def download(self, stream: int, nbytes: int) -> None:
        if not self.shared:
            self.cuda.copy(self.host, self.address, nbytes, stream)

    def free(self) -> None:
        if not self.shared:
            self.cuda.release(self.address)
        self.cuda.release_host(self.host)


class ContextSlot:
    """One execution context with its buffers; not for two threads at a time."""

    def __init__(
        self, cuda: Cuda, context: Any, tensors: Mapping[str, IoTensor], errors: Any, *, use_graph: bool
    ) -> None:
        self.cuda, self.context, self.tensors, self.errors, self.use_graph = cuda, context, tensors, errors, use_graph
        self.buffers: dict[str, Buffer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.graph = 0
        self.warm = False  # whether these shapes have run once
        self.stream = cuda.stream()
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        """Allocate buffers for the largest shapes, and bind their addresses to the context."""
        for tensor in self.tensors.values():
            if tensor.is_input:
                self._require(
                    self.context.set_input_shape(tensor.name, tensor.largest),
                    f"input {tensor.name} of {list(tensor.largest)}",
                )
        self._require(not self.context.infer_shapes(), "inferring shapes")
        for tensor in self.tensors.values():
            shape = self._shape(tensor.name)
            self.buffers[tensor.name] = Buffer(self.cuda, math.prod(shape) * tensor.dtype.itemsize)
            self._require(
                self.context.set_tensor_address(tensor.name, self.buffers[tensor.name].address),
                f"the address of {tensor.name}",
            )
            self.shapes[tensor.name] = shape

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self.context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(
                f"tensor {name} has the shape {list(shape)}, which depends on the data; expected shapes "
                "that depend on the input shapes only, as edgedetr export writes them"
            )
        return shape

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Copies of all outputs; a feed is a numpy array, or anything on the device with __cuda_array_interface__."""
        self._reshape({name: tuple(int(size) for size in feed.shape) for name, feed in feeds.items()})
        for name, feed in feeds.items():
            self._feed(self.tensors[name], feed)
        self._execute()
        outputs = [tensor for tensor in self.tensors.values() if not tensor.is_input]
        for tensor in outputs:
            self.buffers[tensor.name].download(self.stream, math.prod(self.shapes[tensor.name]) * tensor.dtype.itemsize)
        self.cuda.wait(self.stream)
        self._raise_reported("running the engine")
        return {p.name: np.array(self.buffers[p.name].array(self.shapes[p.name], p.dtype)) for p in outputs}

    def report(self, profiler: Any) -> None:
        """Let TensorRT report the time of every layer to a profiler, before `execute_async_v3` returns."""
        if self.use_graph:
            raise ValueError("a CUDA graph reports no layers; expected use_graph=False")
        self.context.profiler = profiler

    def _reshape(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if all(self.shapes[name] == shape for name, shape in shapes.items()):
            return
        self._drop_graph()
        self.warm = False
        for name, shape in shapes.items():
            self._require(self.context.set_input_shape(name, shape), f"input {name} of {list(shape)}")
        self._require(not self.context.infer_shapes(), "inferring shapes")
        self.shapes = {name: self._shape(name) for name in self.tensors}

    def _feed(self, tensor: IoTensor, feed: Any) -> None:
        buffer, shape = self.buffers[tensor.name], self.shapes[tensor.name]
        nbytes = math.prod(shape) * tensor.dtype.itemsize
        if isinstance(feed, np.ndarray):
            buffer.array(shape, tensor.dtype)[...] = feed
            buffer.upload(self.stream, nbytes)
            return
        array = feed.__cuda_array_interface__
        if np.dtype(array["typestr"]) != tensor.dtype or not _contiguous(array, tensor.dtype):
            raise UsageError(
                f"{tensor.name} on the device is {array['typestr']} with strides {array.get('strides')}; "
                f"expected {tensor.dtype} in C order, without gaps"
            )
        producer = array.get("stream", LEGACY_STREAM)
        if producer is not None:  # None: the producer has already waited
            self.cuda.wait(int(producer))
        self.cuda.copy(buffer.address, int(array["data"][0]), nbytes, self.stream)

    def _execute(self) -> None:
        """Queue the first run layer by layer, because TensorRT initializes itself then; later runs as a CUDA graph."""
        if self.warm and self.use_graph and not self.graph:
            self._record()
        if self.graph:
            self.cuda.launch(self.graph, self.stream)
            return
        self._require(self.context.execute_async_v3(self.stream), "queueing the engine")
        self.warm = True

    def _record(self) -> None:
        self.cuda.wait(self.stream)  # queued copies must not become part of the graph
        try:
            self.graph = self.cuda.capture(self.stream, self._queue)
        except DeviceError as error:  # the next run without a graph shows whether the device itself fails
            self.use_graph = False
            self.errors.take()
            log.warning("no CUDA graph for this engine; it is queued layer by layer: %s", error)

    def _queue(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise CaptureError(f"TensorRT returned an error: {self.errors.take() or 'no reason given'}")

    def _require(self, worked: Any, what: str) -> None:
        if not worked:
            raise EngineError(
                f"TensorRT failed at {what}: {self.errors.take() or 'no reason given'}; "
                "build the engine again: edgedetr build BUNDLE --force"
            )

    def _raise_reported(self, what: str) -> None:
        reported = self.errors.take()
        if reported:
            raise EngineError(f"TensorRT reported at {what}: {reported}")

    def _drop_graph(self) -> None:
        if self.graph:
            self.cuda.destroy_graph(self.graph)
        self.graph = 0

    def close(self) -> None:
        """Free everything; the context first, because it uses the addresses."""
        self.context = None
        self._drop_graph()
        for buffer in self.buffers.values():
            buffer.free()
        self.buffers = {}
        if self.stream:
            self.cuda.destroy_stream(self.stream)
        self.stream = 0


def _contiguous(array: Mapping[str, Any], dtype: np.dtype) -> bool:
    strides, expected = array.get("strides"), dtype.itemsize
    for size, stride in zip(reversed(array["shape"]), reversed(strides or ())):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
