"""A TensorRT without a GPU: names and parameters of NVIDIA's bindings, arithmetic of ONNX Runtime, memory of fake_cuda.

A plan is the bytes of an ONNX file. Running one queues work on the fake CUDA stream that reads the inputs and writes
the outputs at the addresses which the context was given, so wrong addresses, missing waits and stale graphs give wrong
numbers here as they would on a device.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_cuda
import numpy as np
import onnxruntime

from edgedetr.runtime.tensorrt import engine_metadata, engine_validation, gpu
from edgedetr.runtime.tensorrt.engine_layers import LayerSummary
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments, EngineMetadata
from edgedetr.runtime.tensorrt.gpu import probe

NUMPY = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(uint8)": ("UINT8", np.uint8),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
}


class Spec:
    """An object of TensorRT as this version has it: no other names, no other arguments, no other attributes to set."""

    __slots__ = ("__weakref__", "_real", "_self")

    def __init__(self, real: type, behavior: Any) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_self", behavior)

    def __getattr__(self, name: str) -> Any:
        attribute = inspect.getattr_static(self._real, name, None)
        if attribute is None:
            raise AttributeError(f"{self._real.__name__} of this TensorRT has no {name}")
        found = getattr(self._self, name)
        if not callable(attribute):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            inspect.signature(attribute).bind(self, *arguments, **named)
            return found(*arguments, **named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        attribute = inspect.getattr_static(self._real, name, None)
        if not isinstance(attribute, property) or attribute.fset is None:
            raise AttributeError(f"{name} of {self._real.__name__} cannot be set in this TensorRT")
        setattr(self._self, name, value)


class Behavior:
    """What the fake does, and the faults that a test sets.

    fake            the CUDA under it
    gone            "context", "engine", "runtime" in the order in which they were destroyed
    refuse          names of calls that fail: "deserialize", "context", "set_input_shape", "infer_shapes",
                    "set_tensor_address", "execute", "capture"
    report          error text that a refused call leaves with the error recorder; "" leaves none
    batches         (least, usual, largest) batch of plans with an open batch
    layers          layer -> milliseconds that each run reports to the profiler of its context
    shift           added to every float output of a run with more than one image, row by row (TensorRT issue 4813)
    """

    def __init__(self, fake: fake_cuda.FakeCuda) -> None:
        self.fake = fake
        self.gone: list[str] = []
        self.refuse: set[str] = set()
        self.report = "Internal error: a reason"
        self.batches = (1, 2, 4)
        self.shift = 0.0
        self.layers: dict[str, float] = {}
        self.contexts = 0
        self.executed = 0
        self.location, self.layout = "DEVICE", "LINEAR"
        self.open_output = False
        self.kinds: dict[str, str] = {}  # tensor -> name of its DataType, where it shall not be the graph's


def install(monkeypatch: Any, names: ModuleType, fake: fake_cuda.FakeCuda) -> Behavior:
    """Let `import tensorrt` find the fake with the names of this version."""
    behavior, original = Behavior(fake), names.Runtime
    monkeypatch.setitem(sys.modules, "tensorrt", names)
    monkeypatch.setattr(names, "Runtime", lambda logger: Spec(original, _Runtime(names, behavior, logger)))
    return behavior


class _Runtime:
    def __init__(self, trt: ModuleType, behavior: Behavior, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger)
        self.trt, self.behavior, self.error_recorder = trt, behavior, None

    def deserialize_cuda_engine(self, plan: bytes) -> Spec | None:
        if "deserialize" in self.behavior.refuse:
            _report(self)
            return None
        return Spec(self.trt.ICudaEngine, _Engine(self, _session(plan)))

    def __del__(self) -> None:
        self.behavior.gone.append("runtime")


class _Engine:
    def __init__(self, runtime: _Runtime, session: onnxruntime.InferenceSession) -> None:
        self.trt, self.behavior, self.session, self.error_recorder = runtime.trt, runtime.behavior, session, None
        self.tensors = {
            v.name: (v, index < len(session.get_inputs()))
            for index, v in enumerate([*session.get_inputs(), *session.get_outputs()])
        }
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, self.behavior.kinds.get(name, NUMPY[self.tensors[name][0].type][0]))

    def get_tensor_location(self, name: str) -> Any:
        return getattr(self.trt.TensorLocation, self.behavior.location)

    def get_tensor_format(self, name: str) -> Any:
        return getattr(self.trt.TensorFormat, self.behavior.layout)

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if self.tensors[name][1] else self.trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name][0].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(n if size < 0 else size for size in self.get_tensor_shape(name)) for n in self.behavior.batches]

    def create_execution_context(self) -> Spec | None:
        if "context" in self.behavior.refuse:
            _report(self)
            return None
        self.behavior.contexts += 1
        return Spec(self.trt.IExecutionContext, _Context(self))

    def __del__(self) -> None:
        self.behavior.gone.append("engine")


class _Context:
    def __init__(self, engine: _Engine) -> None:
        # Like the real one, a context keeps no engine alive for its user: only what it computes with.
        self.behavior, self.session, self.tensors = engine.behavior, engine.session, engine.tensors
        self.shapes = {name: engine.get_tensor_shape(name) for name in engine.tensors}
        self.addresses: dict[str, int] = {}
        self.error_recorder = None
        self.profiler: Any = None

    def _refused(self, what: str) -> bool:
        if what in self.behavior.refuse:
            _report(self)
            return True
        return False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._refused("set_input_shape") or (shape[0] > max(self.behavior.batches) and self.shapes[name][0] < 0):
            return False
        self.shapes[name] = tuple(shape)
        for other, (tensor, is_input) in self.tensors.items():
            if not is_input and not isinstance(tensor.shape[0], int):
                self.shapes[other] = (shape[0], *tensor.shape[1:])
        return True

    def infer_shapes(self) -> list[str]:
        return ["images"] if self._refused("infer_shapes") else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shapes[name][1:]) if self.behavior.open_output and name == "boxes" else self.shapes[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return not self._refused("set_tensor_address")

    def execute_async_v3(self, stream_handle: int) -> bool:
        capturing = self.behavior.fake.capturing(stream_handle)
        if self._refused("capture" if capturing else "execute"):
            return False
        if self.profiler is not None:
            assert not capturing  # a graph's layers are not reported
            for name, ms in self.behavior.layers.items():
                self.profiler.report_layer_time(name, ms)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        session, tensors, behavior = self.session, self.tensors, self.behavior

        def work() -> None:
            behavior.executed += 1
            arrays = {
                name: fake_cuda.at(addresses[name], shapes[name], NUMPY[tensor.type][1])
                for name, (tensor, _) in tensors.items()
            }
            found = session.run(None, {name: np.array(arrays[name]) for name, (_, is_in) in tensors.items() if is_in})
            for output, value in zip(session.get_outputs(), found):
                rows = np.arange(len(value)).reshape(-1, *[1] * (value.ndim - 1))
                arrays[output.name][...] = value + (behavior.shift * rows).astype(value.dtype)

        behavior.fake.enqueue(stream_handle, work)
        return True

    def __del__(self) -> None:
        self.behavior.gone.append("context")


def write_plan(
    graph: Path,
    target: Path | None = None,
    *,
    precision: str = "fp32",
    batch: Any = 1,
    layers: Any = None,
    **changes: Any,
) -> Path:
    """What `edgedetr build` leaves for a graph on the fake device: a plan and its metadata, changed where asked."""
    device, target = probe(), target or graph.with_suffix(".plan")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(graph.read_bytes())
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    sizes = batch if isinstance(batch, tuple) else (batch,) * 3
    layers = layers or LayerSummary({precision: 3}, {precision: 1}, 0)
    metadata = EngineMetadata(
        target.name,
        digest,
        target.stat().st_size,
        graph.name,
        digest,
        gpu.tensorrt().__version__,
        device.runtime,
        device.driver,
        "",
        device.name,
        device.sm,
        engine_validation.host(make=True),
        BuildArguments(precision, sizes, 1024, 3, "strong"),
        "strong",
        1.0,
        layers,
    )
    engine_metadata.metadata_path(target).write_bytes(engine_metadata.to_bytes(replace(metadata, **changes)))
    return target


def _report(reporter: Any) -> None:
    if reporter.behavior.report and reporter.error_recorder is not None:
        reporter.error_recorder.report_error(None, reporter.behavior.report)


def _session(plan: bytes) -> onnxruntime.InferenceSession:
    """As OrtRunner runs it; without optimizations where ONNX Runtime's own fusions fail (FP16 Q/DQ around Concat)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        return onnxruntime.InferenceSession(plan, options)
    except Exception:  # noqa: BLE001  # the library's exceptions share no public base class
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(plan, options)
