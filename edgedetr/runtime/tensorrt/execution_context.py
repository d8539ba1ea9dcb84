"""What one thread needs to run an engine: an execution context, a stream, fixed buffers and a CUDA graph.

A context must not be used by two threads, and a graph holds the addresses it was recorded with; so both belong to a
lane, and nothing in a lane moves until the shapes change.
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

LEGACY_STREAM = 1  # the handle of the default stream, which producers that name no stream work on


@dataclass(frozen=True)
class IoTensor:
    """An input or output of an engine. `shape` has -1 where it is open; `largest` is what its profile allows."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    largest: tuple[int, ...]
    is_input: bool


class Buffer:
    """Memory that the CPU sees as `array` and the device at `address`.

    Where CPU and GPU share memory (Jetson) it is one piece, mapped and cached for both, and no copy is made; elsewhere
    it is a page-locked half and a half on the device.
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
        """The CPU's view; valid until `free`."""
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
    """One context with its buffers. Not for two threads at a time."""

    def __init__(
        self, cuda: Cuda, context: Any, ports: Mapping[str, IoTensor], errors: Any, *, use_graph: bool
    ) -> None:
        self.cuda, self.context, self.ports, self.errors, self.use_graph = cuda, context, ports, errors, use_graph
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
        """Buffers for the largest shapes, whose addresses the context keeps."""
        for port in self.ports.values():
            if port.is_input:
                self._require(
                    self.context.set_input_shape(port.name, port.largest), f"input {port.name} of {list(port.largest)}"
                )
        self._require(not self.context.infer_shapes(), "inferring shapes")
        for port in self.ports.values():
            shape = self._shape(port.name)
            self.buffers[port.name] = Buffer(self.cuda, math.prod(shape) * port.dtype.itemsize)
            self._require(
                self.context.set_tensor_address(port.name, self.buffers[port.name].address),
                f"the address of {port.name}",
            )
            self.shapes[port.name] = shape

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self.context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(
                f"tensor {name} has the shape {list(shape)}, which depends on the data; expected shapes "
                "that follow from the input's, as edgedetr export writes them"
            )
        return shape

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Copies of all outputs; a feed is a numpy array, or anything on the device with __cuda_array_interface__."""
        self._reshape({name: tuple(int(size) for size in feed.shape) for name, feed in feeds.items()})
        for name, feed in feeds.items():
            self._feed(self.ports[name], feed)
        self._execute()
        outputs = [port for port in self.ports.values() if not port.is_input]
        for port in outputs:
            self.buffers[port.name].download(self.stream, math.prod(self.shapes[port.name]) * port.dtype.itemsize)
        self.cuda.wait(self.stream)
        self._raise_reported("running the engine")
        return {p.name: np.array(self.buffers[p.name].array(self.shapes[p.name], p.dtype)) for p in outputs}

    def _reshape(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if all(self.shapes[name] == shape for name, shape in shapes.items()):
            return
        self._drop_graph()
        self.warm = False
        for name, shape in shapes.items():
            self._require(self.context.set_input_shape(name, shape), f"input {name} of {list(shape)}")
        self._require(not self.context.infer_shapes(), "inferring shapes")
        self.shapes = {name: self._shape(name) for name in self.ports}

    def _feed(self, port: IoTensor, feed: Any) -> None:
        buffer, shape = self.buffers[port.name], self.shapes[port.name]
        nbytes = math.prod(shape) * port.dtype.itemsize
        if isinstance(feed, np.ndarray):
            buffer.array(shape, port.dtype)[...] = feed
            buffer.upload(self.stream, nbytes)
            return
        told = feed.__cuda_array_interface__
        if np.dtype(told["typestr"]) != port.dtype or not _contiguous(told, port.dtype):
            raise UsageError(
                f"{port.name} on the device is {told['typestr']} with strides {told.get('strides')}; "
                f"expected {port.dtype} in C order, without gaps"
            )
        producer = told.get("stream", LEGACY_STREAM)
        if producer is not None:  # None: the producer has already waited
            self.cuda.wait(int(producer))
        self.cuda.copy(buffer.address, int(told["data"][0]), nbytes, self.stream)

    def _execute(self) -> None:
        """Plainly the first time, for TensorRT sets itself up then; from the second time as a graph."""
        if self.warm and self.use_graph and not self.graph:
            self._record()
        if self.graph:
            self.cuda.launch(self.graph, self.stream)
            return
        self._require(self.context.execute_async_v3(self.stream), "queueing the engine")
        self.warm = True

    def _record(self) -> None:
        self.cuda.wait(self.stream)  # the copies that are queued are not part of the graph
        try:
            self.graph = self.cuda.capture(self.stream, self._queue)
        except DeviceError as error:  # a plain run will say whether the device itself is ill
            self.use_graph = False
            self.errors.take()
            log.warning("no CUDA graph for this engine, it is queued layer by layer: %s", error)

    def _queue(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise CaptureError(f"TensorRT refused: {self.errors.take() or 'no reason given'}")

    def _require(self, worked: Any, what: str) -> None:
        if not worked:
            raise EngineError(
                f"TensorRT failed at {what}: {self.errors.take() or 'no reason given'}; "
                "build the engine again: edgedetr build BUNDLE --force"
            )

    def _raise_reported(self, what: str) -> None:
        said = self.errors.take()
        if said:
            raise EngineError(f"TensorRT reported at {what}: {said}")

    def _drop_graph(self) -> None:
        if self.graph:
            self.cuda.destroy_graph(self.graph)
        self.graph = 0

    def close(self) -> None:
        """Give everything back; the context goes first, because it holds the addresses."""
        self.context = None
        self._drop_graph()
        for buffer in self.buffers.values():
            buffer.free()
        self.buffers = {}
        if self.stream:
            self.cuda.destroy_stream(self.stream)
        self.stream = 0


def _contiguous(told: Mapping[str, Any], dtype: np.dtype) -> bool:
    strides, expected = told.get("strides"), dtype.itemsize
    for size, stride in zip(reversed(told["shape"]), reversed(strides or ())):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
