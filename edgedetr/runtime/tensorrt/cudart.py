"""CUDA's runtime library by ctypes: memory, copies, streams and graphs; every return code is checked.

Works with libcudart of CUDA 11, 12 and 13, without a CUDA package for Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from edgedetr.errors import DeviceError
from edgedetr.runtime.tensorrt.gpu import DOCTOR, Device, load_cudart, probe

# enum cudaError, cudaMemcpyKind and flags of driver_types.h, the same in CUDA 11, 12 and 13.
OUT_OF_MEMORY = 2
CAPTURE_ERRORS = range(900, 909)  # cudaErrorStreamCapture*: the work cannot be recorded, and can still be run
COPY_DEFAULT = 4  # the direction follows from the addresses
NON_BLOCKING = 1  # the stream does not wait for the default stream
HOST_ALLOC_MAPPED = 2
CAPTURE_THREAD_LOCAL = 1  # other threads may go on using CUDA while this one records


class CaptureError(DeviceError):
    """Work on a stream could not be recorded as a graph."""


# Every function that is called, with its arguments; all return an int of enum cudaError unless RESULTS says otherwise.
SIGNATURES: dict[str, list[object]] = {
    "cudaGetErrorName": [c_int],
    "cudaGetErrorString": [c_int],
    "cudaGetLastError": [],
    "cudaMemGetInfo": [POINTER(c_size_t), POINTER(c_size_t)],
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cudaFreeHost": [c_void_p],
    "cudaHostGetDevicePointer": [POINTER(c_void_p), c_void_p, c_uint],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreateWithFlags": [POINTER(c_void_p), c_uint],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamDestroy": [c_void_p],
    "cudaStreamBeginCapture": [c_void_p, c_int],
    "cudaStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaGraphDestroy": [c_void_p],
}
RESULTS: dict[str, object] = {"cudaGetErrorName": c_char_p, "cudaGetErrorString": c_char_p}
# CUDA 12 put flags where CUDA 11 had the node and the text of an error.
INSTANTIATE_11: list[object] = [POINTER(c_void_p), c_void_p, c_void_p, c_char_p, c_size_t]
INSTANTIATE_12: list[object] = [POINTER(c_void_p), c_void_p, c_ulonglong]


class Cuda:
    """Calls into libcudart. Addresses, streams and graphs are plain integers; `device` is the result of probe."""

    def __init__(self, device: Device | None = None) -> None:
        self.device = device or probe()
        library = load_cudart(int(self.device.driver.partition(".")[0]))
        self.old_graphs = self.device.runtime.startswith("11.")
        signatures = {**SIGNATURES, "cudaGraphInstantiate": INSTANTIATE_11 if self.old_graphs else INSTANTIATE_12}
        self.functions: dict[str, Callable[..., Any]] = {}  # c_int comes back as int, c_char_p as bytes
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, RESULTS.get(name, c_int)
            self.functions[name] = function

    def _call(self, name: str, *arguments: object, what: str = "") -> None:
        code = self.functions[name](*arguments)
        if code:
            self._fail(name, int(code), what)

    def _fail(self, name: str, code: int, what: str) -> None:
        texts = [str(self.functions[f"cudaGetError{kind}"](code), "ascii", "replace") for kind in ("Name", "String")]
        self.functions["cudaGetLastError"]()  # so that the next call does not report this error again
        if code == OUT_OF_MEMORY:
            raise DeviceError(
                f"{self.device.name} is out of memory: {what or name} failed, {self._memory()}; "
                f"close other programs that use the GPU, or use a smaller batch"
            )
        text = f"{name} returned {texts[0]} ({code}): {texts[1]}"
        raise CaptureError(text) if code in CAPTURE_ERRORS else DeviceError(f"{text}; {DOCTOR}")

    def _memory(self) -> str:
        free, total = c_size_t(), c_size_t()
        if self.functions["cudaMemGetInfo"](ctypes.byref(free), ctypes.byref(total)):
            return "free memory unknown"
        return f"{free.value / 2**20:.0f} of {total.value / 2**20:.0f} MiB are free"

    def _created(self, name: str, *arguments: object, what: str = "") -> int:
        """The value that a function writes through its first argument."""
        made = c_void_p()
        self._call(name, ctypes.byref(made), *arguments, what=what)
        return made.value or 0

    def free_bytes(self) -> int:
        """Free memory of the device."""
        free, total = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        """Device memory; its address."""
        return self._created("cudaMalloc", nbytes, what=f"a buffer of {nbytes} bytes on the device")

    def release(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, nbytes: int) -> int:
        """Page-locked host memory that the device can address too; its address for the CPU."""
        return self._created("cudaHostAlloc", nbytes, HOST_ALLOC_MAPPED, what=f"a page-locked buffer of {nbytes} bytes")

    def device_address(self, host: int) -> int:
        """The device's address of memory from `allocate_host`."""
        return self._created("cudaHostGetDevicePointer", host, 0)

    def release_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy on a stream, in any direction."""
        self._call("cudaMemcpyAsync", target, source, nbytes, COPY_DEFAULT, stream)

    def stream(self) -> int:
        """A new stream: the default stream would synchronize the whole device at every step."""
        return self._created("cudaStreamCreateWithFlags", NON_BLOCKING)

    def wait(self, stream: int) -> None:
        """Wait until everything on the stream is done; errors of queued work are raised here."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def capture(self, stream: int, work: Callable[[], object]) -> int:
        """Record what `work` queues on the stream as a graph that can be launched. Errors: CaptureError."""
        self._call("cudaStreamBeginCapture", stream, CAPTURE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            self._abandon(stream)
            raise
        graph = c_void_p()
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        if not graph.value:
            raise CaptureError("nothing was recorded: cudaStreamEndCapture gave no graph")
        try:
            rest = (None, None, 0) if self.old_graphs else (0,)
            return self._created("cudaGraphInstantiate", graph.value, *rest, what="a CUDA graph")
        finally:
            self._call("cudaGraphDestroy", graph.value)

    def _abandon(self, stream: int) -> None:
        graph = c_void_p()
        if not self.functions["cudaStreamEndCapture"](stream, ctypes.byref(graph)) and graph.value:
            self._call("cudaGraphDestroy", graph.value)
        self.functions["cudaGetLastError"]()

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)
