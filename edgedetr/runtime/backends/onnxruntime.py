"""ONNX Runtime on the CPU: it runs everywhere, and without optimizations it is the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgedetr.artifacts import ORT
from edgedetr.errors import BundleError, EdgedetrError, MissingDependency
from edgedetr.packages import missing
from edgedetr.runtime.backends.base import Backend, RawOutputs, weight_bits
from edgedetr.runtime.cpu import bounded
from edgedetr.runtime.kernels import PRODUCT, Kernel
from edgedetr.runtime.onnx_bytes import GraphNode, nodes, read, require_whole
from edgedetr.telemetry import import_onnxruntime

CPU = "CPUExecutionProvider"
WRITE_AGAIN = "write it again with: edgedetr export"
# Beginnings of the names of kernels that multiply integers.
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")
# Nodes that change the form of a tensor and not its values.
MOVES = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast")
TOKEN = re.compile(r"_token_\d+$")  # ONNX Runtime adds it to the name of a node that it has replaced


class OrtRunner:
    """An ONNX file in an ONNX Runtime session.

    path       the file, or a serialized graph
    threads    threads of one operator; None = all cores
    optimize   False: every node runs as written, Q/DQ in float arithmetic
    """

    name = "onnxruntime"

    def __init__(self, path: str | Path | bytes, *, threads: int | None = None, optimize: bool = True) -> None:
        self.session = self._open(path, threads, optimize)
        _check("the graph" if isinstance(path, bytes) else path, self.session)
        shape = self.session.get_inputs()[0].shape
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None
        self.height, self.width = int(shape[2]), int(shape[3])
        self.weight_bits = weight_bits(self.session.get_modelmeta().custom_metadata_map)

    def _open(self, path: str | Path | bytes, threads: int | None, optimize: bool) -> Any:
        return open_session(path, threads, optimize)

    def run(self, images: np.ndarray) -> RawOutputs:
        logits, boxes = self.session.run(["logits", "boxes"], {"images": images})
        return RawOutputs(logits, boxes)


class OrtFrameRunner:
    """A graph for whole camera frames (see runtime/frame_detector.py)."""

    name = "onnxruntime"
    outputs = ("boxes", "scores", "labels")

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.session = open_session(path, threads, optimize=True)
        inputs, outputs = self.session.get_inputs(), {output.name for output in self.session.get_outputs()}
        shape = inputs[0].shape
        if [i.name for i in inputs] != ["frames"] or not set(self.outputs) <= outputs or len(shape) != 4:
            raise BundleError(
                f"{path}: inputs {[i.name for i in inputs]} and outputs {sorted(outputs)}; expected "
                "frames [1, H, W, 3] -> boxes, scores, labels, as edgedetr export --frame writes them"
            )
        self.height, self.width = int(shape[1]), int(shape[2])

    def run(self, frame: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(list(self.outputs), {"frames": frame})))


def tensors(
    model: bytes,
    images: np.ndarray,
    names: Collection[str],
    *,
    threads: int | None = None,
    optimize: bool = True,
    feed: str = "images",
) -> dict[str, np.ndarray]:
    """Values of named graph outputs of a serialized model, for one batch given to the input `feed`."""
    session = open_session(model, threads, optimize)
    return dict(zip(names, session.run(list(names), {feed: images})))


def kernels(model: bytes, *, threads: int | None = None, open_with: Callable[..., Any] | None = None) -> list[Kernel]:
    """The convolutions and matrix products of the graph that ONNX Runtime has made of this one.

    open_with   open_session, or another function of its kind
    """
    with TemporaryDirectory(prefix="edgedetr-") as folder:
        path = Path(folder) / "optimized.onnx"
        (open_with or open_session)(model, threads, True, optimized=path)
        optimized = nodes(path.read_bytes())
    producers = {name: node for node in optimized for name in node.outputs}
    found = []
    for node in optimized:
        if PRODUCT.search(node.operator):
            names = {TOKEN.sub("", node.name), *node.outputs}
            for name in node.inputs:
                names |= _sources(name, producers)
            found.append(Kernel(node.operator, node.operator.startswith(INTEGER), frozenset(names - {""})))
    return found


def _sources(tensor: str, producers: Mapping[str, GraphNode]) -> set[str]:
    """The tensor, and what it is made of by nodes that compute nothing."""
    found = {tensor}
    while (node := producers.get(tensor)) is not None and node.operator in MOVES and node.inputs:
        tensor = node.inputs[0]
        found.add(tensor)
    return found


BACKEND = Backend(
    ORT,
    "onnxruntime",
    OrtRunner,
    is_reference=True,
    tensors=tensors,
    kernels=kernels,
    why_float={
        "Gemm": "MatMul and the Add of its bias are fused to a Gemm of floats before integers are looked for",
        "FusedGemm": "MatMul, Add and activation are fused to a Gemm of floats before integers are looked for",
        "FusedConv": "its output is not quantized, or its activation is not one that the integer kernel has",
    },
)


def plain_session(
    model: bytes,
    *,
    optimize: bool | str = False,
    threads: int | None = None,
    spin: bool = True,
    integers: bool = True,
    lean: bool = False,
    in_order: bool = False,
    profile: Path | None = None,
    error: type[EdgedetrError] = BundleError,
    fix: str = WRITE_AGAIN,
) -> Any:
    """A session of a serialized graph on the CPU, for any inputs and outputs.

    optimize   True: all optimizations; "basic": the quick ones; False: every node runs as written
    spin       whether threads spin between runs
    integers   False: Q/DQ pairs stay as they are written, and are computed in float arithmetic
    lean       less memory, a little slower: it goes back after each run
    in_order   nodes run in the order of the graph, those that an optimization made after the others that can run;
               False: depth first from the last node that has no reader, then from the one before it
    profile    begin of the name of a file for the time of every node, which `end_profiling` writes
    error      raised for external weights, and where ONNX Runtime rejects the graph, with `fix` at the end
    """
    onnxruntime = library()
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as exceptions, so its log lines add nothing
    options.intra_op_num_threads = bounded(threads)  # 0 = one per core
    options.inter_op_num_threads = 1
    options.graph_optimization_level = {
        True: levels.ORT_ENABLE_ALL,
        False: levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
    }[optimize]
    options.enable_cpu_mem_arena = not lean
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.add_session_config_entry("session.force_spinning_stop", "1")  # no time of the next graph
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    data = require_whole(model, error=error)
    return _open(onnxruntime, data, options, [CPU], "the graph", error, fix)


def library() -> Any:
    """The module onnxruntime; MissingDependency where it cannot be imported."""
    try:
        return import_onnxruntime()
    except ImportError as error:
        raise MissingDependency(missing("onnxruntime", error)) from error


def _open(
    onnxruntime: Any,
    model: bytes,
    options: Any,
    providers: list[Any],
    what: str,
    error: type[EdgedetrError] = BundleError,
    fix: str = WRITE_AGAIN,
) -> Any:
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as reason:  # the library's exceptions share no public base class
        raise error(f"{what}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}); {fix}") from reason


def open_session(
    model: bytes | str | Path,
    threads: int | None,
    optimize: bool,
    providers: Sequence[Any] = (CPU,),
    *,
    optimized: Path | None = None,
) -> Any:
    """A session of one of our graphs, a file or its bytes.

    threads     of one operator; None = all cores
    optimize    False: every node runs as written
    providers   ONNX Runtime's execution providers, the preferred one first
    optimized   a file to which the optimized graph is written
    """
    onnxruntime = library()
    what = "the graph" if isinstance(model, bytes) else str(model)
    data = require_whole(model) if isinstance(model, bytes) else read(model)[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings about constant folding do not matter
    options.intra_op_num_threads = bounded(threads)  # 0 = one per core
    options.inter_op_num_threads = 1
    # Threads that spin after a run would slow down the backend that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if optimized is not None:
        options.log_severity_level = 4  # it warns that the file holds for this kind of CPU only
        options.optimized_model_filepath = str(optimized)
    return _open(onnxruntime, data, options, list(providers), what)


def _check(path: str | Path, session: Any) -> None:
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    if [i.name for i in inputs] != ["images"] or not {"logits", "boxes"} <= set(outputs) or len(inputs[0].shape) != 4:
        raise BundleError(
            f"{path}: inputs {[i.name for i in inputs]} and outputs {outputs}; "
            f"expected images [B, 3, H, W] -> logits, boxes, as edgedetr export writes them"
        )
