"""TensorRT engines on the device: numpy, TensorRT and libcudart by ctypes; no torch, no CUDA package for Python."""

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

# By the names of trt.DataType: trt.nptype raises for types that numpy lacks, and says not which tensor has it.
DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
LONGEST = 400  # characters of an error text of TensorRT that are kept


class Session:
    """A deserialized engine: named arrays in, named arrays out, from any number of threads.

    data        the plan; whoever made it decides what this process does, so check it first (see guards.check)
    use_graph   record a CUDA graph after one run of each shape, where the engine allows it
    ports       inputs and outputs by name
    """

    def __init__(self, data: bytes, *, cuda: Cuda | None = None, use_graph: bool = True, what: str = "engine") -> None:
        self.cuda = cuda or Cuda()  # first: TensorRT's Runtime would end the process where there is no driver
        trt = gpu.tensorrt()
        self.what, self.use_graph = what, use_graph
        self._make_recorder = lambda: _recorder(trt)
        self._logger = gpu.make_logger(trt)
        self._errors = self._make_recorder()
        try:
            self._runtime: Any = trt.Runtime(self._logger)
        except TypeError as error:  # how the bindings say that the library gave nothing
            said = "; ".join(self._logger.errors) or error
            raise EngineError(
                f"TensorRT {trt.__version__} does not start here ({said}); run: edgedetr doctor"
            ) from error
        self._runtime.error_recorder = self._errors
        self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            said = "; ".join(filter(None, [self._errors.take(), *self._logger.errors])) or "no reason given"
            self._runtime = None
            raise EngineError(
                f"{what}: TensorRT {trt.__version__} cannot deserialize it ({said}); "
                "build it here: edgedetr build BUNDLE --force"
            )
        self._engine.error_recorder = self._errors
        self._own = threading.local()
        self._lanes: list[ContextSlot] = []
        self._lock = threading.Lock()
        self._closed = False
        problem = ""
        try:
            self.ports = _ports(trt, self._engine, what)
        except EngineError as error:
            problem = str(error)
        if problem:  # outside of `except`: a traceback would keep the engine alive beyond its runtime
            self.close()
            raise EngineError(problem)

    def run(self, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
        """All outputs for these inputs: numpy arrays, or arrays on the device with __cuda_array_interface__."""
        expected = {port.name for port in self.ports.values() if port.is_input}
        if feeds.keys() != expected:
            raise UsageError(f"{self.what} takes {sorted(expected)}, given were {sorted(feeds)}")
        for name, feed in feeds.items():
            port = self.ports[name]
            shape = tuple(int(size) for size in feed.shape)
            if (isinstance(feed, np.ndarray) and feed.dtype != port.dtype) or not _fits(shape, port):
                most = f" up to {list(port.largest)}" if -1 in port.shape else ""
                raise UsageError(
                    f"{name} is {feed.dtype} {list(shape)}; {self.what} takes {port.dtype} {list(port.shape)}{most}"
                )
        return self._lane().run(feeds)

    def _lane(self) -> ContextSlot:
        """This thread's lane; a thread that comes for the first time gets a context of its own."""
        lane: ContextSlot | None = getattr(self._own, "lane", None)
        if lane is None:
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
                lane = ContextSlot(self.cuda, context, self.ports, errors, use_graph=self.use_graph)
                self._lanes.append(lane)
            self._own.lane = lane
        if lane.context is None:
            raise UsageError(f"{self.what} has been closed")
        return lane

    @property
    def graphs(self) -> int:
        """How many threads run this engine as a CUDA graph now."""
        return sum(bool(lane.graph) for lane in self._lanes)

    def close(self) -> None:
        """Contexts, then the engine, then the runtime; nobody may be running it any more."""
        with self._lock:
            self._closed = True
            while self._lanes:
                self._lanes.pop().close()
            self._engine = None
            self._runtime = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrtRunner:
    """An engine of a detector, checked before it is deserialized (see guards.check).

    batch       its number of images per run; None where it is open, up to `largest_batch`
    onnx_sha256 what it must have been built from; None: whatever it was
    trust       run a plan that was not built here: its author's code runs then
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
        port = _one_input(self.session, "images", 4, ("logits", "boxes"), "images [B, 3, H, W] -> logits, boxes")
        if port.dtype != np.float32 or port.shape[1] != 3:
            self.session.close()
            raise EngineError(
                f"{path}: images is {port.dtype} {list(port.shape)}; expected float32 [B, 3, H, W]; "
                "build it from a graph that edgedetr export wrote"
            )
        self.batch: int | None = port.shape[0] if port.shape[0] > 0 else None
        self.largest_batch = port.largest[0]
        self.height, self.width = port.shape[2], port.shape[3]

    def run(self, images: Any) -> RawOutputs:
        """images float32 [B, 3, height, width] as numpy array or on the device -> RawOutputs.

        Fewer images than a fixed batch has are filled up with the last one, and its results cut off; more than an
        open batch allows go in parts. Arrays on the device must have a batch that the engine takes.
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
        port = _one_input(self.session, "frames", 4, self.outputs, "frames [1, H, W, 3] -> boxes, scores, labels")
        self.height, self.width = port.shape[1], port.shape[2]

    def run(self, frame: Any) -> dict[str, np.ndarray]:
        """frame [1, H, W, 3] uint8 RGB, numpy or on the device -> boxes [1, k, 4], scores [1, k], labels [1, k]."""
        found = self.session.run({"frames": frame})
        return {name: found[name] for name in self.outputs}

    def close(self) -> None:
        self.session.close()


def _open(path: Path, use_graph: bool, trust: bool, onnx_sha256: str | None) -> tuple[Session, EngineMetadata | None]:
    device = probe()  # before anything of TensorRT
    trt = gpu.tensorrt()
    checked = engine_validation.check(path, device, trt.__version__, onnx_sha256=onnx_sha256, trust=trust)
    return Session(checked.data, cuda=Cuda(device), use_graph=use_graph, what=str(path)), checked.metadata


def _one_input(session: Session, name: str, rank: int, outputs: tuple[str, ...], expected: str) -> IoTensor:
    inputs = [port for port in session.ports.values() if port.is_input]
    given = {port.name for port in session.ports.values() if not port.is_input}
    if [port.name for port in inputs] != [name] or not set(outputs) <= given or len(inputs[0].shape) != rank:
        session.close()
        raise EngineError(
            f"{session.what}: inputs {[p.name for p in inputs]} and outputs {sorted(given)}; expected "
            f"{expected}; build it from a graph that edgedetr export wrote"
        )
    return inputs[0]


def _ports(trt: Any, engine: Any, what: str) -> dict[str, IoTensor]:
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
                f"{what}: tensor {name} must lie in host memory (a shape input); expected a graph whose "
                "shapes follow from the input's"
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


def _fits(shape: tuple[int, ...], port: IoTensor) -> bool:
    return len(shape) == len(port.shape) and all(
        0 < size <= most if told < 0 else size == told for size, told, most in zip(shape, port.shape, port.largest)
    )


def _recorder(trt: Any) -> Any:
    """An error recorder that keeps texts until they are taken; TensorRT calls it from threads of its own."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.found: list[tuple[Any, str]] = []

        def take(self) -> str:
            """What was reported since the last time, and forget it."""
            told, self.found = self.found, []
            return "; ".join(text[:LONGEST] for _, text in told)

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
            return True  # the call that reported it must end

    return Recorder()
