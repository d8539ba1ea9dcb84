"""From the bytes of an ONNX file to a serialized TensorRT engine: the one file that calls TensorRT's builder.

Every name used exists in 10.3, 10.16 and 11.4, or is asked for by hasattr. Flags go by name: their numbers changed in
11. The network is strongly typed, so the types of the graph decide and nothing else; TensorRT 11 knows no other kind.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from edgedetr.errors import EngineError
from edgedetr.progress import Progress
from edgedetr.runtime.tensorrt.cudart import Device
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.library import make_logger, tensorrt, version

log = logging.getLogger(__name__)


STRONG_SINCE = (10, 12)  # before it strong typing exists and is little tested: weak typing may stand in
WEAK_FLAGS = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}
SAID = 12  # error lines of TensorRT that a message repeats; the first ones name the cause
MEMORY_WORDS = ("out of memory", "insufficient memory", "outofmemory", "cuda error 2", "memory allocation")


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and what was learned by building it.

    layers         the engine inspector's JSON
    timing_cache   to be given to the next build on this device; empty where there is none
    typing         "strong" or "weak"
    seconds        of the build alone
    notes          what a user should know of how it was built
    """

    data: bytes
    layers: str
    timing_cache: bytes
    typing: str
    seconds: float
    notes: tuple[str, ...] = ()


class _BuildFailed(Exception):
    """One attempt failed; the other kind of typing may still work."""


def build_plan(
    model: bytes,
    arguments: BuildArguments,
    device: Device,
    *,
    what: str = "the graph",
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> Plan:
    """Build an engine; EngineError with everything that TensorRT said when it cannot be built.

    device   what cudart.probe gave: TensorRT must not be touched where there is no driver
    what     the graph's name in messages
    """
    trt = tensorrt()
    weak = hasattr(trt.BuilderFlag, "INT8") and hasattr(trt.BuilderFlag, "FP16")
    if arguments.typing == "weak" and not weak:
        raise EngineError(
            f"TensorRT {trt.__version__} has no weakly typed networks any more; expected --typing strong "
            "or auto; run: edgedetr build BUNDLE"
        )
    attempts = [arguments.typing] if arguments.typing != "auto" else ["strong"]
    if (
        arguments.typing == "auto"
        and weak
        and arguments.precision != "fp32"
        and (version(trt.__version__) < STRONG_SINCE)
    ):
        attempts.append("weak")
    failures: list[str] = []
    for typing in attempts:
        try:
            made = _attempt(trt, model, arguments, typing, timing_cache, progress)
        except _BuildFailed as failure:
            failures.append(f"{typing}ly typed: {failure}")
            log.warning("%s: %s", what, failures[-1])
            continue
        notes = tuple(f"could not be built {failure}" for failure in failures)
        return Plan(made.data, _inspect(trt, made.data, what), made.timing_cache, typing, made.seconds, notes)
    raise EngineError(
        f"{what}: TensorRT {trt.__version__} cannot build it for {device.name} "
        f"({arguments.precision}, batch {arguments.batch_name}): "
        + "\n".join(failures)
        + _advice("\n".join(failures), arguments)
    )


@dataclass(frozen=True)
class _Built:
    data: bytes
    timing_cache: bytes
    seconds: float


def _attempt(
    trt: Any, model: bytes, arguments: BuildArguments, typing: str, timing_cache: bytes, progress: Progress | None
) -> _Built:
    begun = time.perf_counter()
    logger = make_logger(trt)  # must outlive everything below
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # how the bindings say that the library gave nothing
        raise EngineError(
            f"TensorRT {trt.__version__} does not start here ({_said(logger.errors) or error}); run: edgedetr doctor"
        ) from error
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typing == "strong" else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise _BuildFailed("the parser refuses the graph:\n" + _parser_errors(parser))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, arguments.workspace_mb << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = arguments.optimization_level
    if arguments.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it rounds products to 10 bits of mantissa
    if typing == "weak":
        for name in WEAK_FLAGS[arguments.precision]:
            config.set_flag(getattr(trt.BuilderFlag, name))
    _add_profile(builder, network, config, arguments.batch)
    cache = _use_timing_cache(config, timing_cache)
    monitor = _make_monitor(trt, progress) if progress is not None and hasattr(trt, "IProgressMonitor") else None
    if monitor is not None:
        config.progress_monitor = monitor
    data = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.stopped is not None:
        raise monitor.stopped
    if data is None:
        raise _BuildFailed("the builder gives no engine:\n" + (_said(logger.errors) or "and does not say why"))
    updated = config.get_timing_cache() if cache is not None else None
    saved = updated.serialize() if updated is not None else None
    made = _Built(bytes(data), bytes(saved) if saved is not None else b"", time.perf_counter() - begun)
    del data, saved, updated, cache, config, parser, network, builder  # the engine is loaded next: memory, and order
    return made


def _add_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """A range of batch sizes for every input that leaves its first size open; other open sizes are refused."""
    profile, needed = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise EngineError(
                f"input {tensor.name} is {list(shape)}: sizes besides the batch are open; expected one "
                "image size; write the graph again: edgedetr export BUNDLE"
            )
        if shape and shape[0] == -1:
            needed = True
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in batch))
    if needed and config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"TensorRT refuses batch sizes {batch[0]}, {batch[1]}, {batch[2]} (least, usual, largest); "
            "expected sizes that the graph can take; build for one size: edgedetr build BUNDLE"
        )


def _use_timing_cache(config: Any, data: bytes) -> Any:
    """Start from the timings of earlier builds; from none where they are damaged or of another kind."""
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    if not data:
        return None
    log.warning("the timing cache of earlier builds is not usable; building without it")
    cache = config.create_timing_cache(b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _make_monitor(trt: Any, progress: Progress) -> Any:
    """Tells `progress` of the outermost phases of the build. Ctrl-C stops the build, not the process."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._tell(phase_name, step + 1)
            return self.stopped is None  # False asks TensorRT to stop

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self._tell(phase_name, self.steps.pop(phase_name))

        def _tell(self, phase: str, done: int) -> None:
            # An exception must not pass through TensorRT's C++ frames: it is kept, and raised after the build.
            try:
                progress(f"build: {phase}", done, self.steps.get(phase, done))
            except BaseException as error:  # noqa: BLE001  # Ctrl-C too
                self.stopped = self.stopped or error

    return Monitor()


def _parser_errors(parser: Any) -> str:
    """Every error of the parser with the node it is about."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, kind = error.node_name(), error.node_operator()
        lines.append(f"  node {name or '(no name)'} ({kind or 'no operator'}): {error.desc()}")
    return "\n".join(lines) or "  and does not say why"


def _said(errors: list[str]) -> str:
    """What the logger kept, without repetitions."""
    different = list(dict.fromkeys(errors))
    more = f"\n  and {len(different) - SAID} more" if len(different) > SAID else ""
    return "\n".join(f"  {line}" for line in different[:SAID]) + more


def _advice(text: str, arguments: BuildArguments) -> str:
    if any(word in text.lower() for word in MEMORY_WORDS):
        return (
            f"\nthe device ran out of memory: close other programs, add swap, or use less than "
            f"--workspace {arguments.workspace_mb} MB or a smaller batch"
        )
    return "\nwhat TensorRT does not take in this graph: edgedetr lint BUNDLE"


def _inspect(trt: Any, data: bytes, what: str) -> str:
    """Load the engine once, which proves that it loads, and ask what its layers are."""
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"{what}: TensorRT {trt.__version__} built an engine that it cannot load:\n"
            f"{_said(logger.errors)}{_advice(_said(logger.errors), _NO_ARGUMENTS)}"
        )
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, engine, runtime  # in this order; the logger last
    if not isinstance(text, str) or not text.strip():
        return json.dumps({"Layers": []})
    return text


_NO_ARGUMENTS = BuildArguments("", (1, 1, 1), 0, 0, "")
