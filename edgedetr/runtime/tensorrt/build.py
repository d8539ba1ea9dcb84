"""Build TensorRT engines from a bundle, on the device that will run them. Like make: one that fits is kept."""

from __future__ import annotations

import hashlib
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedetr.artifacts import ENGINE_GRAPHS, FrameGraph, frame_graph
from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError, EngineError, MissingDependency, UsageError
from edgedetr.image_size import check_size
from edgedetr.runtime import machine
from edgedetr.runtime.arguments import check_count, check_word, is_whole, shown
from edgedetr.runtime.backends import onnx_bytes
from edgedetr.runtime.bundle_detector import open_bundle
from edgedetr.runtime.onnx_facts import OnnxFacts
from edgedetr.runtime.tensorrt import cache as store
from edgedetr.runtime.tensorrt import cudart, engine_validation, inspector, known_issues
from edgedetr.runtime.tensorrt import engine_metadata as sidecar
from edgedetr.runtime.tensorrt.builder import Plan, Progress, build_plan
from edgedetr.runtime.tensorrt.cudart import Device
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments, Sidecar
from edgedetr.runtime.tensorrt.library import tensorrt

log = logging.getLogger(__name__)

TYPINGS = ("auto", "strong", "weak")
LEVELS = range(6)  # of TensorRT's builder_optimization_level; 3 is its default
LARGEST_BATCH = 1024
SMALLEST_WORKSPACE = 64  # MB; below it convolutions lose their fast kernels
LARGEST_DEFAULT = 4096  # MB; detectors use far less, and more only makes the search longer


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that fits this device.

    made   whether it was built now; False: it was there
    """

    path: Path
    sidecar: Sidecar
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
    """Build the engine of one precision, or keep the one that is there and fits.

    precision            "fp32", "fp16" or "int8": which graph of the bundle
    batch                number of images of a run, or (least, usual, largest) for an engine that takes several
    frame                (height, width): the engine for whole camera frames instead, see runtime/frame_detector.py
    workspace_mb         memory that kernels may use while they run; None = a safe share of the device's
    optimization_level   0..5, how long kernels are searched for
    typing               "strong": the graph's types decide; "weak": TensorRT 10 chooses; "auto": weak if strong fails
    force                build it again
    """
    sizes = _check_words(precision, batch, optimization_level, typing)
    if frame is not None:
        frame = check_size(frame, "frame")
    check_count(workspace_mb, "workspace_mb")
    bundle = open_bundle(bundle)
    trt = _here(bundle)
    device = cudart.probe()
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
    stem = sidecar.stem(arguments, device, trt.__version__, digest)
    for folder in store.folders(bundle) if not force else ():
        kept = _kept(folder / f"{stem}.plan", device, trt.__version__, digest)
        if kept is not None:
            return kept
    concerning = known_issues.concerning(facts, trt.__version__, device.sm, arguments)
    for entry in concerning:
        if entry.refuse:
            raise EngineError(f"{bundle.path / name}, TensorRT {trt.__version__}: {entry}")
    folder = store.writable_folder(bundle, needed=len(model))
    with store.one_at_a_time(folder):
        plan = folder / f"{stem}.plan"
        kept = None if force else _kept(plan, device, trt.__version__, digest)  # another process may have built it
        if kept is not None:
            return kept
        cache = store.timing_cache_path(device, trt.__version__)
        try:
            made = build_plan(
                model,
                arguments,
                device,
                what=str(bundle.path / name),
                timing_cache=store.read_timing_cache(cache),
                progress=progress,
            )
        except EngineError as error:
            hints = "".join(f"\nknown: {entry}" for entry in concerning if entry.on_failure)
            raise EngineError(f"{error}{hints}") from error
        store.write_timing_cache(cache, made.timing_cache)
        warnings = tuple(str(entry) for entry in concerning if not entry.on_failure) + made.notes
        told = Sidecar(
            plan=plan.name,
            plan_sha256=hashlib.sha256(made.data).hexdigest(),
            plan_bytes=len(made.data),
            onnx=name,
            onnx_sha256=digest,
            tensorrt=trt.__version__,
            cuda=device.runtime,
            driver=device.driver,
            jetpack=machine.jetpack(),
            device=device.name,
            sm=device.sm,
            host=machine.host(make=True),
            arguments=arguments,
            typing=made.typing,
            seconds=round(made.seconds, 1),
            layers=inspector.summarize(made.layers),
            warnings=warnings,
        )
        _publish(plan, made, told)
    log.info("%s: built in %.0f s", plan, made.seconds)
    return BuiltEngine(plan, told, True)


def outdated(bundle: Bundle) -> list[Path]:
    """Plans in the bundle that were built from a graph it no longer has; nothing will ever load them."""
    found = []
    for plan in sorted((bundle.path / store.FOLDER).glob("*.plan")):
        try:
            told = sidecar.read(plan)
        except EngineError:
            continue
        entry = bundle.manifest.files.get(told.onnx) if told is not None else None
        if told is not None and (entry is None or entry.sha256 != told.onnx_sha256):
            found.append(plan)
    return found


def _publish(plan: Path, made: Plan, told: Sidecar) -> None:
    store.publish(
        {
            plan.with_suffix(".layers.json"): made.layers.encode(),
            plan: made.data,
            sidecar.beside(plan): sidecar.to_bytes(told),
        }
    )


def _kept(plan: Path, device: Device, version: str, digest: str) -> BuiltEngine | None:
    """The engine that is there, if it may be used."""
    if not plan.exists():
        return None
    try:
        told = engine_validation.check(plan, device, version, onnx_sha256=digest).sidecar
    except EngineError as reason:
        log.warning("building again: %s", reason)
        return None
    if told is not None and (changed := engine_validation.drift(told, device)):
        log.warning("building again: %s: %s", plan, changed)
        return None
    return BuiltEngine(plan, told, False) if told is not None else None


def _here(bundle: Bundle):  # type: ignore[no-untyped-def]  # a module, or an error
    try:
        return tensorrt()
    except MissingDependency as error:
        where = shlex.quote(str(bundle.path))
        raise MissingDependency(
            f"{error}; engines are built on the device that runs them: copy {where} there and run: "
            f"edgedetr build {where}"
        ) from error


def _check_words(precision: str, batch: int | tuple[int, int, int], level: int, typing: str) -> tuple[int, int, int]:
    """Batch sizes as (least, usual, largest); UsageError for words that mean nothing."""
    check_word(precision, ENGINE_GRAPHS, "precision")
    check_word(typing, TYPINGS, "typing")
    if not is_whole(level) or level not in LEVELS:
        raise UsageError(f"optimization_level is {shown(level)}; expected a whole number from 0 to {LEVELS[-1]}")
    sizes: list[Any] = [batch] * 3 if is_whole(batch) else list(batch) if isinstance(batch, (tuple, list)) else []
    if len(sizes) != 3 or not all(map(is_whole, sizes)):
        raise UsageError(f"batch is {shown(batch)}; expected a whole number, or three: least, usual, largest")
    least, usual, largest = sizes
    if not 1 <= least <= usual <= largest <= LARGEST_BATCH:
        raise UsageError(
            f"batch is {shown(batch)} (least, usual, largest); expected numbers in ascending order, from "
            f"1 to {LARGEST_BATCH}"
        )
    return least, usual, largest


def _check_batch(bundle: Bundle, name: str, precision: str, facts: OnnxFacts, sizes: tuple[int, int, int]) -> None:
    """The graph must take these batch sizes; most graphs are written for one image."""
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
            f"{bundle.path / name} takes batches of {fixed} only, {wanted} was asked for; expected a "
            f"graph whose batch size is open; "
            f"run: {ENGINE_GRAPHS[precision].command.format(path=bundle.path)} --dynamic-batch"
        )


def _workspace(asked: int | None, device: Device) -> int:
    """MB. A board shares its memory with everything else: an eighth of it is 1 GB on one of 8 GB."""
    total = device.total_bytes >> 20
    if asked is None:
        return max(SMALLEST_WORKSPACE, min(LARGEST_DEFAULT, total // (8 if device.integrated else 4)))
    if not SMALLEST_WORKSPACE <= asked <= total:
        raise UsageError(
            f"workspace is {asked} MB; expected from {SMALLEST_WORKSPACE} to the {total} MB of {device.name}"
        )
    return asked
