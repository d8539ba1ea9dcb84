"""Run TensorRT engines with numpy, TensorRT and libcudart (by ctypes); no torch and no CUDA package for Python."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgedetr.errors import EngineError, UsageError
from edgedetr.runtime.backends.base import RawOutputs, run_in_batches
from edgedetr.runtime.tensorrt import engine_validation, gpu
from edgedetr.runtime.tensorrt.cudart import Cuda
from edgedetr.runtime.tensorrt.engine_metadata import EngineMetadata
from edgedetr.runtime.tensorrt.execution_context import ContextSlot, IoTensor
from edgedetr.runtime.tensorrt.gpu import probe

# By the names of trt.DataType: trt.nptype raises for types that numpy lacks without naming the tensor.
DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
LONGEST = 400  # characters of an error message of TensorRT that are kept


class Session:
    """A deserialized engine: named arrays in, named arrays out, from any number of threads.

    data        the plan; it is executable code, so check it first (see engine_validation.check)
    use_graph   record a CUDA graph after the first run of a shape, where the engine allows it
    tensors     inputs and outputs by name
    """

    def __init__(self, data: bytes, *, cuda: Cuda | None = None, use_graph: bool = True, what: str = "engine") -> None:
        self.cuda = cuda or Cuda()  # first: TensorRT's Runtime ends the process where there is no driver
        trt = gpu.tensorrt()
        self.what, self.use_graph = what, use_graph
        self._make_recorder = lambda: _recorder(trt)
        self._logger = gpu.make_logger(trt)
        self._errors = self._make_recorder()
        try:
            self._runtime: Any = trt.Runtime(self._logger)
        except TypeError as error:  # the bindings raise it where the library returned a null pointer
            reasons = "; ".join(self._logger.errors) or error
            raise EngineError(
                f"TensorRT {trt.__version__} does not start here ({reasons}); run: edgedetr doctor"
            ) from error
        self._runtime.error_recorder = self._errors
        self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            reasons = "; ".join(filter(None, [self._errors.take(), *self._logger.errors])) or "no reason given"
            self._runtime = None
            raise EngineError(
                f"{what}: TensorRT {trt.__version__} cannot deserialize it ({reasons}); "
                "build it here: edgedetr build BUNDLE --force"
            )
        self._engine.error_recorder = self._errors
        self._thread = threading.local()
        self._slots: list[ContextSlot] = []
        self._lock = threading.Lock()
        self._closed = False
        problem = ""
        try:
            self.tensors = _io_tensors(trt, self._engine, what)
        except EngineError as error:
            problem = str(error)
        if problem:  # outside of `except`: the traceback would keep the engine alive longer than its runtime
            self.close()
            raise EngineError(problem)

    def run(self, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
        """All outputs for these inputs: numpy arrays, or arrays on the device with __cuda_array_interface__."""
        expected = {tensor.name for tensor in self.tensors.values() if tensor.is_input}
        if feeds.keys() != expected:
            raise UsageError(f"{self.what} takes {sorted(expected)}, not {sorted(feeds)}")
        for name, feed in feeds.items():
            tensor = self.tensors[name]
            shape = tuple(int(size) for size in feed.shape)
            if (isinstance(feed, np.ndarray) and feed.dtype != tensor.dtype) or not _fits(shape, tensor):
                most = f" up to {list(tensor.largest)}" if -1 in tensor.shape else ""
                raise UsageError(
                    f"{name} is {feed.dtype} {list(shape)}; {self.what} takes {tensor.dtype} {list(tensor.shape)}{most}"
                )
        return self._slot().run(feeds)

    def _slot(self) -> ContextSlot:
        """The context slot of this thread, created at its first run."""
        slot: ContextSlot | None = getattr(self._thread, "slot", None)
        if slot is None:
            with self._lock:
                if self._closed:
                    raise UsageError(f"{self.what} has been closed")
                errors = self._make_recorder()
                context = self._engine.create_execution_context()
                if context is None:
                    raise EngineError(
                        f"{self.what}: no execution context "
                        f"({self._errors.take() or 'probably too little memory on the device'}); "
                        "close other programs that use the GPU, or use fewer threads"
                    )
                context.error_recorder = errors
                slot = ContextSlot(self.cuda, context, self.tensors, errors, use_graph=self.use_graph)
                self._slots.append(slot)
            self._thread.slot = slot
        if slot.context is None:
            raise UsageError(f"{self.what} has been closed")
        return slot

    def report(self, profiler: Any) -> None:
        """Report the time of every layer of this thread's runs to a profiler of TensorRT, an IProfiler.

        A CUDA graph reports nothing, so the session must be one without (use_graph=False).
        """
        self._slot().report(profiler)

    @property
    def graphs(self) -> int:
        """How many threads run this engine as a CUDA graph now."""
        return sum(bool(slot.graph) for slot in self._slots)

    def close(self) -> None:
        """Free the contexts, then the engine, then the runtime; no thread may be running the engine."""
        with self._lock:
            self._closed = True
            while self._slots:
                self._slots.pop().close()
            self._engine = None
            self._runtime = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrtRunner:
    """An engine of a detector, checked before it is deserialized (see engine_validation.check).

    batch         its fixed batch size; None where it is dynamic, up to `largest_batch`
    onnx_sha256   digest of the graph that it must have been built from; None: any graph
    trust         run a plan that was not built here: its author's code runs then
    """

    name = "tensorrt"

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        use_graph: bool = True,
        trust: bool = False,
        onnx_sha256: str | None = None,
    ) -> None:
        self.session, self.metadata = _open(Path(path), use_graph, trust, onnx_sha256)
        tensor = _one_input(self.session, "images", 4, ("logits", "boxes"), "images [B, 3, H, W] -> logits, boxes")
        if tensor.dtype != np.float32 or tensor.shape[1] != 3:
            self.session.close()
            raise EngineError(
                f"{path}: images is {tensor.dtype} {list(tensor.shape)}; expected float32 [B, 3, H, W]; "
                "build it from a graph that edgedetr export wrote"
            )
        self.batch: int | None = tensor.shape[0] if tensor.shape[0] > 0 else None
        self.largest_batch = tensor.largest[0]
        self.height, self.width = tensor.shape[2], tensor.shape[3]

    def run(self, images: Any) -> RawOutputs:
        """images float32 [B, 3, height, width] as numpy array or on the device -> RawOutputs.

        numpy batches of any size are padded or split to what the engine takes; arrays on the device must fit it.
        """
        if not isinstance(images, np.ndarray):
            return self._once(images)
        return run_in_batches(self._once, images, self.batch, self.largest_batch)

    def _once(self, images: Any) -> RawOutputs:
        found = self.session.run({"images": images})
        return RawOutputs(found["logits"].astype(np.float32, copy=False), found["boxes"].astype(np.float32, copy=False))

    def close(self) -> None:
        self.session.close()


class TrtFrameRunner:
    """An engine for whole camera frames (see runtime/frame_detector.py)."""

    name = "tensorrt"
    outputs = ("boxes", "scores", "labels")

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        use_graph: bool = True,
        trust: bool = False,
        onnx_sha256: str | None = None,
    ) -> None:
        self.session, self.metadata = _open(Path(path), use_graph, trust, onnx_sha256)
        tensor = _one_input(self.session, "frames", 4, self.outputs, "frames [1, H, W, 3] -> boxes, scores, labels")
        self.height, self.width = tensor.shape[1], tensor.shape[2]

    def run(self, frame: Any) -> dict[str, np.ndarray]:
        """frame [1, H, W, 3] uint8 RGB, numpy or on the device -> boxes [1, k, 4], scores [1, k], labels [1, k]."""
        found = self.session.run({"frames": frame})
        return {name: found[name] for name in self.outputs}

    def close(self) -> None:
        self.session.close()


def open_engine(path: Path, *, use_graph: bool, onnx_sha256: str) -> Session:
    """A plan that was built here, checked as for TrtRunner."""
    return _open(path, use_graph, False, onnx_sha256)[0]


def _open(path: Path, use_graph: bool, trust: bool, onnx_sha256: str | None) -> tuple[Session, EngineMetadata | None]:
    device = probe()  # before anything of TensorRT
    trt = gpu.tensorrt()
    checked = engine_validation.check(path, device, trt.__version__, onnx_sha256=onnx_sha256, trust=trust)
    return Session(checked.data, cuda=Cuda(device), use_graph=use_graph, what=str(path)), checked.metadata


def _one_input(session: Session, name: str, rank: int, outputs: tuple[str, ...], expected: str) -> IoTensor:
    inputs = [tensor for tensor in session.tensors.values() if tensor.is_input]
    given = {tensor.name for tensor in session.tensors.values() if not tensor.is_input}
    if [tensor.name for tensor in inputs] != [name] or not set(outputs) <= given or len(inputs[0].shape) != rank:
        session.close()
        raise EngineError(
            f"{session.what}: inputs {[p.name for p in inputs]} and outputs {sorted(given)}; expected "
            f"{expected}; build it from a graph that edgedetr export wrote"
        )
    return inputs[0]


def _io_tensors(trt: Any, engine: Any, what: str) -> dict[str, IoTensor]:
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise EngineError(
                f"{what}: tensor {name} is {kind}, which numpy does not have; expected one of {', '.join(DTYPES)}"
            )
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(
                f"{what}: tensor {name} must be in host memory (a shape input); expected a graph whose "
                "shapes depend on the input shapes only"
            )
        if engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
            raise EngineError(
                f"{what}: tensor {name} has the layout {engine.get_tensor_format(name).name}; expected "
                "LINEAR; build it with: edgedetr build BUNDLE --force"
            )
        shape = tuple(int(size) for size in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        largest = shape
        if is_input and -1 in shape:
            largest = tuple(int(size) for size in engine.get_tensor_profile_shape(name, 0)[2])  # min, opt, max
        found[name] = IoTensor(name, np.dtype(DTYPES[kind]), shape, largest, is_input)
    return found


def _fits(shape: tuple[int, ...], tensor: IoTensor) -> bool:
    return len(shape) == len(tensor.shape) and all(
        0 < size <= most if declared < 0 else size == declared
        for size, declared, most in zip(shape, tensor.shape, tensor.largest)
    )


def _recorder(trt: Any) -> Any:
    """An error recorder that stores messages until `take`; TensorRT calls it from its own threads."""

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.found: list[tuple[Any, str]] = []

        def take(self) -> str:
            """The messages since the last call, which are then removed."""
            messages, self.found = self.found, []
            return "; ".join(text[:LONGEST] for _, text in messages)

        def num_errors(self) -> int:
            return len(self.found)

        def get_error_code(self, arg0: int) -> Any:
            return self.found[arg0][0]

        def get_error_desc(self, arg0: int) -> str:
            return self.found[arg0][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.found = []

        def report_error(self, arg0: Any, arg1: str) -> bool:
            self.found.append((arg0, str(arg1).strip()))
            return True  # the call that reported the error fails

    return Recorder()
