"""Build TensorRT engines from a bundle, on the device that runs them; an engine that fits is kept, as make does.

This is the only file that calls TensorRT's builder. Every name used exists in 10.3, 10.16 and 11.4, or is checked with
hasattr. Flags are looked up by name, because their numbers changed in 11. The network is strongly typed: only the types
of the graph decide. TensorRT 11 has no other kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedetr.artifacts import ENGINE_GRAPHS, FrameGraph, frame_graph
from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError, EngineError, MissingDependency, UsageError
from edgedetr.image_size import check_size
from edgedetr.printable import shown
from edgedetr.progress import Progress
from edgedetr.runtime import jetson, onnx_bytes
from edgedetr.runtime.arguments import check_count, check_word, is_whole
from edgedetr.runtime.onnx_bytes import OnnxFacts
from edgedetr.runtime.tensorrt import engine_cache, engine_metadata, engine_validation, gpu, known_issues
from edgedetr.runtime.tensorrt.engine_layers import summarize_layers
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments, EngineMetadata
from edgedetr.runtime.tensorrt.gpu import Device, make_logger, tensorrt, version

log = logging.getLogger(__name__)

TYPINGS = ("auto", "strong", "weak")
LEVELS = range(6)  # of TensorRT's builder_optimization_level; 3 is its default
LARGEST_BATCH = 1024
SMALLEST_WORKSPACE = 64  # MB; below it convolutions lose their fast kernels
LARGEST_DEFAULT = 4096  # MB; detectors use far less, and more only makes the search longer

STRONG_SINCE = (10, 12)  # earlier versions have strong typing, little tested: weak typing is the fallback
WEAK_FLAGS = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}
MOST_LINES = 12  # error lines of TensorRT that a message repeats; the first ones name the cause
MEMORY_WORDS = ("out of memory", "insufficient memory", "outofmemory", "cuda error 2", "memory allocation")


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that fits this device.

    made   whether it was built by this call; False: an engine that fits was kept
    """

    path: Path
    metadata: EngineMetadata
    made: bool


def build(
    bundle: Bundle | str | Path,
    precision: str = "int8",
    *,
    batch: int | tuple[int, int, int] = 1,
    frame: tuple[int, int] | None = None,
    workspace_mb: int | None = None,
    optimization_level: int = 3,
    typing: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build the engine of one precision, or keep an existing one that fits.

    precision            "fp32", "fp16" or "int8": which graph of the bundle
    batch                batch size, or (minimum, optimum, maximum) for an engine with a dynamic batch size
    frame                (height, width): the engine for whole camera frames, see runtime/frame_detector.py
    workspace_mb         scratch memory of kernels; None = a safe fraction of the device's memory
    optimization_level   0..5, how long TensorRT searches for kernels
    typing               "strong": the graph's types decide; "weak": TensorRT 10 chooses; "auto": weak if strong fails
    force                build it again
    """
    sizes = _check_words(precision, batch, optimization_level, typing)
    if frame is not None:
        frame = check_size(frame, "frame")
    check_count(workspace_mb, "workspace_mb")
    bundle = Bundle.open(bundle)
    trt = tensorrt_for(bundle)
    device = gpu.probe()
    graph = ENGINE_GRAPHS[precision]
    name = graph.file if frame is None else FrameGraph(graph, *frame).file
    if frame is not None and name not in bundle.manifest.files:
        size = f"{frame[0]}x{frame[1]}"
        raise BundleError(
            f"{bundle.path}: no {precision} graph for frames of {size}; "
            f"run: {graph.command.format(path=bundle.path)} --frame {size}"
        )
    model, facts = onnx_bytes.read(bundle.require(name), EngineError)
    digest = hashlib.sha256(model).hexdigest()
    if digest != bundle.manifest.files[name].sha256:
        raise BundleError(f"{bundle.path / name}: changed while it was read; run the same command again")
    _check_batch(bundle, name, precision, facts, sizes)
    arguments = BuildArguments(precision, sizes, _workspace(workspace_mb, device), optimization_level, typing)
    stem = engine_metadata.engine_name(arguments, device, trt.__version__, digest)
    for folder in engine_cache.folders(bundle) if not force else ():
        kept = _kept(folder / f"{stem}.plan", device, trt.__version__, digest)
        if kept is not None:
            return kept
    issues = known_issues.affecting(facts, trt.__version__, device.sm, arguments)
    for issue in issues:
        if issue.refuse:
            raise EngineError(f"{bundle.path / name}, TensorRT {trt.__version__}: {issue}")
    folder = engine_cache.writable_folder(bundle, needed=len(model))
    with engine_cache.one_at_a_time(folder):
        plan = folder / f"{stem}.plan"
        kept = None if force else _kept(plan, device, trt.__version__, digest)  # another process may have built it
        if kept is not None:
            return kept
        cache = engine_cache.timing_cache_path(device, trt.__version__)
        try:
            serialized = build_serialized(
                model,
                arguments,
                device,
                what=str(bundle.path / name),
                timing_cache=engine_cache.read_timing_cache(cache),
                progress=progress,
            )
        except EngineError as error:
            hints = "".join(f"\nknown issue: {issue}" for issue in issues if issue.on_failure)
            raise EngineError(f"{error}{hints}") from error
        engine_cache.write_timing_cache(cache, serialized.timing_cache)
        warnings = tuple(str(issue) for issue in issues if not issue.on_failure) + serialized.notes
        metadata = EngineMetadata(
            plan=plan.name,
            plan_sha256=hashlib.sha256(serialized.data).hexdigest(),
            plan_bytes=len(serialized.data),
            onnx=name,
            onnx_sha256=digest,
            tensorrt=trt.__version__,
            cuda=device.runtime,
            driver=device.driver,
            jetpack=jetson.linux_release(),
            device=device.name,
            sm=device.sm,
            host=engine_validation.host(make=True),
            arguments=arguments,
            typing=serialized.typing,
            seconds=round(serialized.seconds, 1),
            layers=summarize_layers(serialized.layers),
            warnings=warnings,
        )
        _publish(plan, serialized, metadata)
    log.info("%s: built in %.0f s", plan, serialized.seconds)
    return BuiltEngine(plan, metadata, True)


def outdated(bundle: Bundle) -> list[Path]:
    """Plans in the bundle whose graph it no longer has, so that nothing loads them."""
    found = []
    for plan in sorted((bundle.path / engine_cache.FOLDER).glob("*.plan")):
        try:
            metadata = engine_metadata.read(plan)
        except EngineError:
            continue
        entry = bundle.manifest.files.get(metadata.onnx) if metadata is not None else None
        if metadata is not None and (entry is None or entry.sha256 != metadata.onnx_sha256):
            found.append(plan)
    return found


def _publish(plan: Path, serialized: SerializedEngine, metadata: EngineMetadata) -> None:
    engine_cache.publish(
        {
            plan.with_suffix(".layers.json"): serialized.layers.encode(),
            plan: serialized.data,
            engine_metadata.metadata_path(plan): engine_metadata.to_bytes(metadata),
        }
    )


def _kept(plan: Path, device: Device, version: str, digest: str) -> BuiltEngine | None:
    """An existing engine, if it is valid and fits; None: build it."""
    if not plan.exists():
        return None
    try:
        metadata = engine_validation.check(plan, device, version, onnx_sha256=digest).metadata
    except EngineError as reason:
        log.warning("building again: %s", reason)
        return None
    if metadata is not None and (changed := engine_validation.drift(metadata, device)):
        log.warning("building again: %s: %s", plan, changed)
        return None
    return BuiltEngine(plan, metadata, False) if metadata is not None else None


def tensorrt_for(bundle: Bundle, options: str = "") -> Any:
    """The module tensorrt. Errors: MissingDependency that says to copy the bundle to the device.

    options   of the command that the message names
    """
    try:
        return tensorrt()
    except MissingDependency as error:
        where = shlex.quote(str(bundle.path))
        raise MissingDependency(
            f"{error}; engines are built on the device that runs them: copy {where} there and run: "
            f"edgedetr build {where}{f' {options}' if options else ''}"
        ) from error


def _check_words(precision: str, batch: int | tuple[int, int, int], level: int, typing: str) -> tuple[int, int, int]:
    """Batch sizes as (minimum, optimum, maximum). Errors: UsageError for an unknown or impossible option."""
    check_word(precision, ENGINE_GRAPHS, "precision")
    check_word(typing, TYPINGS, "typing")
    if not is_whole(level) or level not in LEVELS:
        raise UsageError(f"optimization_level is {shown(level)}; expected a whole number from 0 to {LEVELS[-1]}")
    sizes: list[Any] = [batch] * 3 if is_whole(batch) else list(batch) if isinstance(batch, (tuple, list)) else []
    if len(sizes) != 3 or not all(map(is_whole, sizes)):
        raise UsageError(f"batch is {shown(batch)}; expected a whole number, or three: minimum, optimum, maximum")
    minimum, optimum, maximum = sizes
    if not 1 <= minimum <= optimum <= maximum <= LARGEST_BATCH:
        raise UsageError(
            f"batch is {shown(batch)} (minimum, optimum, maximum); expected numbers in ascending order, from "
            f"1 to {LARGEST_BATCH}"
        )
    return minimum, optimum, maximum


def _check_batch(bundle: Bundle, name: str, precision: str, facts: OnnxFacts, sizes: tuple[int, int, int]) -> None:
    """Check that the graph takes these batch sizes; most graphs take one image. Errors: UsageError, BundleError."""
    whole_frames = frame_graph(name) is not None
    taken, given = ("frames", ("boxes", "scores", "labels")) if whole_frames else ("images", ("logits", "boxes"))
    shape = facts.inputs.get(taken)
    if shape is None or not set(given) <= set(facts.outputs):
        raise BundleError(
            f"{bundle.path / name}: inputs {sorted(facts.inputs)} and outputs {sorted(facts.outputs)}; "
            f"expected {taken} -> {', '.join(given)}; run: edgedetr export BUNDLE"
        )
    fixed = shape[0] if shape else 1
    if whole_frames and set(sizes) != {1}:
        raise UsageError(f"{bundle.path / name} takes one frame at a time; expected neither --batch nor --dynamic")
    if isinstance(fixed, int) and set(sizes) != {fixed}:
        wanted = sizes[0] if len(set(sizes)) == 1 else "{}, {}, {}".format(*sizes)
        raise UsageError(
            f"{bundle.path / name} takes batches of {fixed} only, {wanted} was requested; expected a "
            f"graph whose batch size is open; "
            f"run: {ENGINE_GRAPHS[precision].command.format(path=bundle.path)} --dynamic-batch"
        )


def _workspace(requested: int | None, device: Device) -> int:
    """Workspace in MB. A Jetson shares its memory with the CPU: the default is an eighth of it, 1 GB of 8 GB."""
    total = device.total_bytes >> 20
    if requested is None:
        return max(SMALLEST_WORKSPACE, min(LARGEST_DEFAULT, total // (8 if device.integrated else 4)))
    if not SMALLEST_WORKSPACE <= requested <= total:
        raise UsageError(
            f"workspace is {requested} MB; expected from {SMALLEST_WORKSPACE} to the {total} MB of {device.name}"
        )
    return requested


@dataclass(frozen=True)
class SerializedEngine:
    """A serialized engine, and the results of its build.

    layers         the engine inspector's JSON
    timing_cache   input of the next build on this device; empty where there is none
    typing         "strong" or "weak"
    seconds        of the build alone
    notes          messages for the user about the build
    """

    data: bytes
    layers: str
    timing_cache: bytes
    typing: str
    seconds: float
    notes: tuple[str, ...] = ()


class _BuildFailed(Exception):
    """One attempt failed; the other kind of typing may still work."""


def build_serialized(
    model: bytes,
    arguments: BuildArguments,
    device: Device,
    *,
    what: str = "the graph",
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> SerializedEngine:
    """Build an engine. Errors: EngineError with TensorRT's own messages.

    device   the result of gpu.probe: TensorRT must not be used without a driver
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
        return SerializedEngine(
            made.data, _inspect(trt, made.data, what), made.timing_cache, typing, made.seconds, notes
        )
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
    except TypeError as error:  # the bindings raise it where the library returned a null pointer
        raise EngineError(
            f"TensorRT {trt.__version__} does not start here ({_error_lines(logger.errors) or error}); "
            "run: edgedetr doctor"
        ) from error
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typing == "strong" else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise _BuildFailed("the parser rejects the graph:\n" + _parser_errors(parser))
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
        raise _BuildFailed("the builder returns no engine:\n" + (_error_lines(logger.errors) or "without a reason"))
    updated = config.get_timing_cache() if cache is not None else None
    saved = updated.serialize() if updated is not None else None
    made = _Built(bytes(data), bytes(saved) if saved is not None else b"", time.perf_counter() - begun)
    del (
        data,
        saved,
        updated,
        cache,
        config,
        parser,
        network,
        builder,
    )  # frees memory for loading the engine next; the order matters
    return made


def _add_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """Set the range of dynamic batch sizes. Errors: EngineError for an input with another dynamic size."""
    profile, needed = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise EngineError(
                f"input {tensor.name} is {list(shape)}: sizes other than the batch size are dynamic; expected one "
                "image size; write the graph again: edgedetr export BUNDLE"
            )
        if shape and shape[0] == -1:
            needed = True
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in batch))
    if needed and config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"TensorRT rejects batch sizes {batch[0]}, {batch[1]}, {batch[2]} (minimum, optimum, maximum); "
            "expected sizes that the graph can take; build for one size: edgedetr build BUNDLE"
        )


def _use_timing_cache(config: Any, data: bytes) -> Any:
    """Start from the kernel timings of earlier builds; without them where they are damaged or do not fit."""
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    if not data:
        return None
    log.warning("the timing cache of earlier builds is not usable; building without it")
    cache = config.create_timing_cache(b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _make_monitor(trt: Any, progress: Progress) -> Any:
    """Reports the outermost phases of the build to `progress`. Ctrl-C stops the build, and not the process."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._report(phase_name, step + 1)
            return self.stopped is None  # False asks TensorRT to stop

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self._report(phase_name, self.steps.pop(phase_name))

        def _report(self, phase: str, done: int) -> None:
            # An exception must not pass through TensorRT's C++ frames: it is stored, and raised after the build.
            try:
                progress(f"build: {phase}", done, self.steps.get(phase, done))
            except BaseException as error:  # noqa: BLE001  # Ctrl-C too
                self.stopped = self.stopped or error

    return Monitor()


def _parser_errors(parser: Any) -> str:
    """Every error of the parser, with its node."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, kind = error.node_name(), error.node_operator()
        lines.append(f"  node {name or '(no name)'} ({kind or 'no operator'}): {error.desc()}")
    return "\n".join(lines) or "  without a reason"


def _error_lines(errors: list[str]) -> str:
    """The logger's error lines without repetitions, at most MOST_LINES of them."""
    different = list(dict.fromkeys(errors))
    more = f"\n  and {len(different) - MOST_LINES} more" if len(different) > MOST_LINES else ""
    return "\n".join(f"  {line}" for line in different[:MOST_LINES]) + more


def _advice(text: str, arguments: BuildArguments) -> str:
    if any(word in text.lower() for word in MEMORY_WORDS):
        return (
            f"\nthe device ran out of memory: close other programs, add swap, or use less than "
            f"--workspace {arguments.workspace_mb} MB or a smaller batch"
        )
    return "\nsee what TensorRT does not support in this graph: edgedetr lint BUNDLE"


def _inspect(trt: Any, data: bytes, what: str) -> str:
    """The inspector's JSON about the layers; loading the engine for it also proves that it loads."""
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"{what}: TensorRT {trt.__version__} built an engine that it cannot load:\n"
            f"{_error_lines(logger.errors)}{_advice(_error_lines(logger.errors), _NO_ARGUMENTS)}"
        )
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, engine, runtime  # in this order; the logger last
    if not isinstance(text, str) or not text.strip():
        return json.dumps({"Layers": []})
    return text


_NO_ARGUMENTS = BuildArguments("", (1, 1, 1), 0, 0, "")
