"""Run the stages of a bundle over a labeled split: the same bytes for each, in turns, timed as they go."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgedetr.artifacts import BACKENDS, GRAPHS
from edgedetr.bundle import Bundle
from edgedetr.data import images, layouts
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import (
    BundleError,
    DataError,
    DeviceError,
    EdgedetrError,
    EngineError,
    MissingDependency,
    ModelError,
    UsageError,
    did_you_mean,
)
from edgedetr.onnx_graph.fp16_simulation import simulate_fp16
from edgedetr.packages import missing
from edgedetr.progress import Progress
from edgedetr.runtime import preprocess
from edgedetr.runtime.backends import base
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.bundle_detector import Detector, load, load_engine
from edgedetr.runtime.cpu import int8_saturates
from edgedetr.runtime.detections import Detections
from edgedetr.runtime.latency import rotated, timed
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.tensorrt.select import Engine

log = logging.getLogger(__name__)


# Made for TensorRT, with FP16 in it, which CPU libraries round late or never: on a CPU ONNX Runtime scores the twin
# (twin.py), and its time says nothing. OpenVINO leaves the twin's pairs out, so it never scores FP16.
SIMULATED_FP16 = tuple(graph.id for graph in GRAPHS.values() if graph.fp16_inside)


@dataclass
class ArtifactRun:
    """What one stage did on one backend.

    detections   by image id
    seconds      of one inference each, one image at a time, without preparing and decoding; empty for a twin
    oracle       detections of the first images by the same graph in ONNX Runtime without optimizations
    fault        why it gave nothing, or ""
    engine       what runs, on TensorRT
    full_batch   the most images that the engine takes at once
    rows         detections of every row of a full batch of one image, for the first images by image id
    """

    stage: str
    backend: str
    detections: dict[int, Detections] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    oracle: dict[int, Detections] = field(default_factory=dict)
    fault: str = ""
    engine: Engine | None = None
    full_batch: int = 1
    rows: dict[int, list[Detections]] = field(default_factory=dict)


def candidates(
    bundle: Bundle,
    pairs: Sequence[tuple[str, str]],
    stages: Collection[str] | None = None,
    backends: Collection[str] | None = None,
) -> list[tuple[str, str]]:
    """Those (stage, backend) of `pairs` that are asked for, have been exported and can run here."""
    for word in stages or ():
        if word not in GRAPHS:
            raise UsageError(f"stage is {word!r}; expected one of {', '.join(GRAPHS)}{did_you_mean(word, GRAPHS)}")
    for name in backends or ():
        base.get(name)  # UsageError for an unknown one
    chosen = []
    for stage, backend in pairs:
        if (stages and stage not in stages) or (backends and backend not in backends):
            continue
        if not stages and GRAPHS[stage].file not in bundle.manifest.files:
            continue  # not exported yet, and not asked for
        bundle.require(GRAPHS[stage].file)
        if _simulated(stage, backend) and not find_spec("onnx"):
            log.warning("%s is not scored: %s", stage, missing("onnx"))
        elif not (reason := base.get(backend).unavailable()):
            chosen.append((stage, backend))
        elif backends:
            raise MissingDependency(reason)
    if not chosen:
        raise BundleError(
            f"{bundle.path}: nothing to run for stages {sorted(stages or GRAPHS)} on "
            f"{sorted(backends or BACKENDS)}; run: edgedetr export {bundle.path}"
        )
    return chosen


def _simulated(stage: str, backend: str) -> bool:
    """Whether FP16 is simulated: by the reference backend, for artifacts that have FP16 in them."""
    return stage in SIMULATED_FP16 and base.get(backend).is_reference


def without_saturating_int8(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those whose arithmetic this CPU does not saturate: a verdict on others is on the CPU, not on the file."""
    saturated = [(stage, backend) for stage, backend in pairs if stage in base.get(backend).saturates]
    if not saturated or not int8_saturates():
        return list(pairs)
    for stage, backend in saturated:
        log.warning(
            "%s is not run in %s: this CPU has no 8-bit dot product, and the 16-bit sums of that library saturate "
            "on it, which says nothing about the file; ask for it with: --backend %s",
            stage,
            backend,
            backend,
        )
    return [pair for pair in pairs if pair not in saturated]


def load_split(bundle: Bundle, data: str | Path | None = None, split: str | None = None) -> DetectionSet:
    """The labeled images of `data`, or of what the bundle records, with the model's classes (matched by name).

    Errors: DataError where they have objects of a class that the model does not know.
    """
    record = bundle.manifest.data
    if data is None and record is None:
        raise UsageError(f"{bundle.path} records no data set; name one with --data DIR")
    dataset = layouts.load(
        data if data is not None else record.path,  # type: ignore[union-attr]  # above
        split or (record.verify_split if record else "test"),
        classes=bundle.manifest.classes,
    )
    if not len(dataset):
        raise DataError(
            f"{dataset.root}: split {dataset.name!r} has no usable image; run: edgedetr data check {dataset.root}"
        )
    if not any((~sample.crowd).any() for sample in dataset.samples):
        raise DataError(
            f"{dataset.root}: split {dataset.name!r} has no object to measure AP on; "
            f"run: edgedetr data check {dataset.root}"
        )
    return dataset


def run_artifacts(
    bundle: Bundle,
    dataset: DetectionSet,
    pairs: Sequence[tuple[str, str]],
    *,
    threads: int | None = None,
    oracle_images: int = 0,
    progress: Progress | None = None,
    engines: Sequence[Engine] = (),
) -> list[ArtifactRun]:
    """Every image is read once and goes through every stage, one stage after the other in changing order.

    engines   are run after `pairs`, in the same turns

    A stage that cannot be loaded or gives NaN is recorded with its fault and counts as detecting nothing.
    """
    runs = [ArtifactRun(stage, backend) for stage, backend in pairs]
    runs += [ArtifactRun(engine.stage, "tensorrt", engine=engine) for engine in engines]
    loaded = {id(run): detector for run in runs if (detector := _load(bundle, run, threads)) is not None}
    oracles = _oracles(bundle, runs, threads) if oracle_images else {}
    for number, sample in enumerate(dataset.samples):
        picture = images.decode(sample.path)
        batch, geometry = preprocess.prepare([picture], bundle.manifest.input)
        if number == 0:
            _warm_up(runs, loaded, oracles, batch)
        for place in rotated([str(n) for n in range(len(runs))], number):
            run = runs[int(place)]
            if id(run) in loaded and not run.fault:
                _one(run, loaded[id(run)], batch, geometry, sample.image_id)
        if number < oracle_images:
            seen = _seen(runs, oracles, batch, geometry, sample.image_id)
            for run in runs:
                if run.engine is not None:
                    if id(run) in loaded and not run.fault:
                        _full_batch(run, loaded[id(run)], batch, geometry, sample.image_id)
                elif run.stage in seen:
                    run.oracle[sample.image_id] = seen[run.stage]
        if progress:
            progress("verify", number + 1, len(dataset))
    for run in runs:
        if run.fault:
            run.detections = {sample.image_id: _nothing() for sample in dataset.samples}
    return runs


def open_artifact(bundle: Bundle, stage: str, backend: str | None = None, threads: int | None = None) -> Detector:
    """What scores a stage: the twin where ONNX Runtime is to score FP16, else what `load` gives."""
    if stage not in SIMULATED_FP16 or not (backend is None or base.get(backend).is_reference):
        return load(bundle, stage=stage, backend=backend, threads=threads)
    return _twin(bundle, stage, threads)


def _twin(bundle: Bundle, stage: str, threads: int | None) -> Detector:
    """A stage without optimizations, FP16 rounded where the graph says it: what the graph means."""
    manifest, path = bundle.manifest, bundle.require(GRAPHS[stage].file)
    runner = OrtRunner(simulate_fp16(path) if stage in SIMULATED_FP16 else path, threads=threads, optimize=False)
    return Detector(runner, manifest.classes, manifest.input, manifest.output, stage=stage)


def _load(bundle: Bundle, run: ArtifactRun, threads: int | None) -> Detector | None:
    bundle.require(GRAPHS[run.stage].file)  # a missing or stale file is the caller's error, not the backend's fault
    try:
        if run.engine is not None:
            return load_engine(bundle, run.engine)
        return open_artifact(bundle, run.stage, run.backend, threads)
    except (BundleError, DeviceError, EngineError) as error:
        run.fault = str(error)
        log.warning("%s on %s cannot be run: %s", run.stage, run.backend, error)
        return None


def _oracles(bundle: Bundle, runs: Sequence[ArtifactRun], threads: int | None) -> dict[str, Detector]:
    runs = [run for run in runs if run.engine is None]  # a board's CPU would take hours for what was done elsewhere
    if not runs:
        return {}
    if reason := base.reference().unavailable():
        log.warning("no oracle: %s", reason)
        return {}
    # A twin in ONNX Runtime is its own oracle.
    judged = dict.fromkeys(run.stage for run in runs if not _simulated(run.stage, run.backend))
    return {stage: _twin(bundle, stage, threads) for stage in judged}


def _one(
    run: ArtifactRun, detector: Detector, batch: np.ndarray, geometry: list[preprocess.Geometry], image_id: int
) -> None:
    raw = []
    try:
        seconds = timed(lambda: raw.append(detector.run_raw(batch)))
        if not _simulated(run.stage, run.backend):
            run.seconds.append(seconds)
        run.detections[image_id] = _decoded(raw[0], geometry, detector)[0]
    except EdgedetrError as error:
        _fail(run, f"image id {image_id}: {error}")


def _full_batch(
    run: ArtifactRun, detector: Detector, batch: np.ndarray, geometry: list[preprocess.Geometry], image_id: int
) -> None:
    """One image in every row of the largest batch: TensorRT 10.14 and 11.1 gave other results in other rows."""
    run.full_batch = detector.runner.batch or int(getattr(detector.runner, "largest_batch", 1))
    if run.full_batch == 1:
        return
    try:
        raw = detector.runner.run(np.repeat(batch, run.full_batch, axis=0))
        run.rows[image_id] = _decoded(raw, geometry * run.full_batch, detector)
    except EdgedetrError as error:
        _fail(run, f"image id {image_id}, batch of {run.full_batch}: {error}")


def _warm_up(
    runs: Sequence[ArtifactRun], loaded: dict[int, Detector], oracles: dict[str, Detector], batch: np.ndarray
) -> None:
    """The first run of each, which is not timed; who cannot run at all is recorded with its fault."""
    for run in runs:
        if id(run) in loaded:
            try:
                loaded[id(run)].run_raw(batch)
            except EdgedetrError as error:
                _fail(run, str(error))
    for stage, oracle in list(oracles.items()):
        try:
            oracle.run_raw(batch)
        except EdgedetrError as error:
            log.warning("%s in ONNX Runtime without optimizations: %s", stage, error)
            del oracles[stage]


def _seen(
    runs: Sequence[ArtifactRun],
    oracles: dict[str, Detector],
    batch: np.ndarray,
    geometry: list[preprocess.Geometry],
    image_id: int,
) -> dict[str, Detections]:
    """What each oracle finds; where that is NaN, the graph itself is bad, whoever runs it."""
    seen = {}
    for stage, oracle in list(oracles.items()):
        try:
            seen[stage] = _decoded(oracle.run_raw(batch), geometry, oracle)[0]
        except EdgedetrError as error:
            del oracles[stage]
            for run in runs:
                if run.stage == stage and run.engine is None and not run.fault:
                    _fail(run, f"image id {image_id}, in ONNX Runtime without optimizations: {error}")
    return seen


def _decoded(raw: RawOutputs, geometry: list[preprocess.Geometry], detector: Detector) -> list[Detections]:
    if not (np.isfinite(raw.logits).all() and np.isfinite(raw.boxes).all()):
        raise ModelError(
            f"{detector.stage} gives NaN or infinity: its file, or the weights that it was made from, are "
            "no use; run: edgedetr export BUNDLE, and where that changes nothing train again"
        )
    return decode(raw, geometry, detector.classes, detector.output)


def _fail(run: ArtifactRun, fault: str) -> None:
    run.fault = fault
    log.warning("%s on %s: %s", run.stage, run.backend, fault)


def _nothing() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
