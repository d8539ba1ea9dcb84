"""Run the artifacts of a bundle over a labeled split: the same pixels for each, interleaved and timed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgedetr.artifacts import BACKENDS, GRAPHS, TENSORRT
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
from edgedetr.runtime.latency import rotated, timed
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.tensorrt.select import Engine

log = logging.getLogger(__name__)


# Made for TensorRT and partly FP16, which CPU libraries compute in float32: on a CPU, ONNX Runtime scores a simulation
# (onnx_graph/fp16_simulation.py) whose latency is not reported. OpenVINO removes the casts of the simulation, so it
# never scores FP16.
SIMULATED_FP16 = tuple(graph.id for graph in GRAPHS.values() if graph.fp16_inside)


@dataclass
class ArtifactRun:
    """The results of one artifact on one backend.

    detections      by image id
    seconds         of one inference each, one image at a time, without preprocessing and decoding; empty for a
                    simulation of FP16
    reference_run   detections, on the first images, of the same graph in ONNX Runtime without optimizations
    fault           why there are no results, or ""
    engine          the TensorRT engine, on that backend
    full_batch      the largest batch of the engine
    rows            detections of every row of a full batch of one repeated image, for the first images by image id
    """

    artifact: str
    backend: str
    detections: dict[int, Detections] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    reference_run: dict[int, Detections] = field(default_factory=dict)
    fault: str = ""
    engine: Engine | None = None
    full_batch: int = 1
    rows: dict[int, list[Detections]] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether a simulation of FP16 is scored, without optimizations: it is its own reference run."""
        return _simulated(self.artifact, self.backend)

    def fail(self, fault: str) -> None:
        self.fault = fault
        log.warning("%s on %s: %s", self.artifact, self.backend, fault)


def candidates(
    bundle: Bundle,
    pairs: Sequence[tuple[str, str]],
    artifacts: Collection[str] | None = None,
    backends: Collection[str] | None = None,
) -> list[tuple[str, str]]:
    """Those (artifact, backend) of `pairs` that are requested, have been exported and can run on this machine."""
    for name in artifacts or ():
        if name not in GRAPHS:
            raise UsageError(f"artifact is {name!r}; expected one of {', '.join(GRAPHS)}{did_you_mean(name, GRAPHS)}")
    for name in backends or ():
        base.get(name)  # UsageError for an unknown one
    chosen = []
    for artifact, backend in pairs:
        if (artifacts and artifact not in artifacts) or (backends and backend not in backends):
            continue
        if not artifacts and GRAPHS[artifact].file not in bundle.manifest.files:
            continue  # neither exported nor requested
        bundle.require(GRAPHS[artifact].file)
        if _simulated(artifact, backend) and not find_spec("onnx"):
            log.warning("%s is not scored: %s", artifact, missing("onnx"))
        elif not (reason := base.get(backend).unavailable()):
            chosen.append((artifact, backend))
        elif backends:
            raise MissingDependency(reason)
    if not chosen:
        raise BundleError(
            f"{bundle.path}: nothing to run for {', '.join(sorted(artifacts or GRAPHS))} on "
            f"{', '.join(sorted(backends or BACKENDS))}; run: edgedetr export {bundle.path}"
        )
    return chosen


def without_saturating_int8(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without INT8 on backends whose INT8 sums saturate on this CPU: the loss would be the CPU's, not the file's."""
    saturating = [(artifact, backend) for artifact, backend in pairs if artifact in base.get(backend).saturates]
    if not saturating or not int8_saturates():
        return list(pairs)
    for artifact, backend in saturating:
        log.warning(
            "%s is not run in %s: this CPU has no 8-bit dot product, and the 16-bit sums of that library saturate "
            "on it, so the result would not describe the file; to run it anyway: --backend %s",
            artifact,
            backend,
            backend,
        )
    return [pair for pair in pairs if pair not in saturating]


def load_split(bundle: Bundle, data: str | Path | None = None, split: str | None = None) -> DetectionSet:
    """The labeled images of `data`, or of the data set that the bundle records, with the model's classes.

    Classes are matched by name. Errors: DataError for objects of a class that the model does not have.
    """
    record = bundle.manifest.data
    folder = data if data is not None else record.path if record is not None else None
    if folder is None:
        raise UsageError(f"{bundle.path} records no data set; give one with --data DIR")
    dataset = layouts.load(
        folder, split or (record.verify_split if record else "test"), classes=bundle.manifest.classes
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
    reference_images: int = 0,
    progress: Progress | None = None,
    engines: Sequence[Engine] = (),
) -> list[ArtifactRun]:
    """Run every (artifact, backend) of `pairs`, then every engine, on every image.

    Each image is read once and goes through all artifacts before the next one, in an order that changes from image to
    image, so that a change of clock or temperature reaches all of them.
    reference_images   on so many first images the graphs also run in ONNX Runtime without optimizations, and engines
                       run full batches

    An artifact that cannot be loaded or gives NaN is recorded with its fault and without detections.
    """
    runs = [ArtifactRun(artifact, backend) for artifact, backend in pairs]
    runs += [ArtifactRun(engine.stage, TENSORRT, engine=engine) for engine in engines]
    interleaved = _InterleavedRuns(bundle, runs, threads, with_reference=reference_images > 0)
    for number, sample in enumerate(dataset.samples):
        pixels = images.decode(sample.path)
        batch = _Batch(sample.image_id, *preprocess.prepare([pixels], bundle.manifest.input))
        if number == 0:
            interleaved.warm_up(batch)
        interleaved.detect(batch, number)
        if number < reference_images:
            interleaved.run_references(batch)
            interleaved.run_full_batches(batch)
        if progress:
            progress("verify", number + 1, len(dataset))
    for run in runs:
        if run.fault:
            run.detections = {sample.image_id: _no_detections() for sample in dataset.samples}
    return runs


def open_artifact(bundle: Bundle, artifact: str, backend: str | None = None, threads: int | None = None) -> Detector:
    """The detector that scores an artifact: a simulation where ONNX Runtime scores FP16, else `runtime.load`'s."""
    if artifact in SIMULATED_FP16 and (backend is None or base.get(backend).is_reference):
        return _unoptimized(bundle, artifact, threads)
    return load(bundle, stage=artifact, backend=backend, threads=threads)


@dataclass(frozen=True)
class _Batch:
    """One image as the models take it."""

    image_id: int
    images: np.ndarray  # [1, 3, H, W] float32
    geometry: list[preprocess.Geometry]


class _InterleavedRuns:
    """The loaded detectors of all runs, and of the reference runs by artifact."""

    def __init__(
        self, bundle: Bundle, runs: Sequence[ArtifactRun], threads: int | None, *, with_reference: bool
    ) -> None:
        self.runs = runs
        self.detectors = [self._load(bundle, run, threads) for run in runs]
        self.references = self._load_references(bundle, threads) if with_reference else {}

    @staticmethod
    def _load(bundle: Bundle, run: ArtifactRun, threads: int | None) -> Detector | None:
        # A missing or stale file is an error of the caller, not a fault of the backend.
        bundle.require(GRAPHS[run.artifact].file)
        try:
            if run.engine is not None:
                return load_engine(bundle, run.engine)
            return open_artifact(bundle, run.artifact, run.backend, threads)
        except (BundleError, DeviceError, EngineError) as error:
            run.fail(str(error))
            return None

    def _load_references(self, bundle: Bundle, threads: int | None) -> dict[str, Detector]:
        # Not for engines: the CPU of a board would take hours for what was measured on the host.
        runs = [run for run in self.runs if run.engine is None]
        if not runs:
            return {}
        if reason := base.reference().unavailable():
            log.warning("backends are not compared with a reference run: %s", reason)
            return {}
        artifacts = dict.fromkeys(run.artifact for run in runs if not run.simulated)
        return {artifact: _unoptimized(bundle, artifact, threads) for artifact in artifacts}

    def _active(self) -> list[tuple[ArtifactRun, Detector]]:
        return [
            (run, detector)
            for run, detector in zip(self.runs, self.detectors)
            if detector is not None and not run.fault
        ]

    def warm_up(self, batch: _Batch) -> None:
        """The first inference of each model, which is not timed; a model that cannot run gets a fault."""
        for run, detector in self._active():
            try:
                detector.run_raw(batch.images)
            except EdgedetrError as error:
                run.fail(str(error))
        for artifact, detector in list(self.references.items()):
            try:
                detector.run_raw(batch.images)
            except EdgedetrError as error:
                log.warning("%s in ONNX Runtime without optimizations: %s", artifact, error)
                del self.references[artifact]

    def detect(self, batch: _Batch, number: int) -> None:
        """One timed inference of every run, in an order that depends on the image's number."""
        for run, detector in rotated(self._active(), number):
            _time_inference(run, detector, batch)

    def run_references(self, batch: _Batch) -> None:
        """Detections of the graphs without optimizations; NaN there is the graph's fault on every backend."""
        for artifact, detector in list(self.references.items()):
            runs = [run for run in self.runs if run.artifact == artifact and run.engine is None]
            try:
                found = _decode(detector.run_raw(batch.images), batch.geometry, detector)[0]
            except EdgedetrError as error:
                del self.references[artifact]
                for run in runs:
                    if not run.fault:
                        run.fail(f"image id {batch.image_id}, in ONNX Runtime without optimizations: {error}")
                continue
            for run in runs:
                run.reference_run[batch.image_id] = found

    def run_full_batches(self, batch: _Batch) -> None:
        """One image in every row of an engine's largest batch: TensorRT 10.14 and 11.1 gave other results per row."""
        for run, detector in self._active():
            if run.engine is None:
                continue
            run.full_batch = detector.runner.batch or int(getattr(detector.runner, "largest_batch", 1))
            if run.full_batch == 1:
                continue
            try:
                raw = detector.runner.run(np.repeat(batch.images, run.full_batch, axis=0))
                run.rows[batch.image_id] = _decode(raw, batch.geometry * run.full_batch, detector)
            except EdgedetrError as error:
                run.fail(f"image id {batch.image_id}, batch of {run.full_batch}: {error}")


def _time_inference(run: ArtifactRun, detector: Detector, batch: _Batch) -> None:
    raw: list[RawOutputs] = []
    try:
        seconds = timed(lambda: raw.append(detector.run_raw(batch.images)))
        if not run.simulated:
            run.seconds.append(seconds)
        run.detections[batch.image_id] = _decode(raw[0], batch.geometry, detector)[0]
    except EdgedetrError as error:
        run.fail(f"image id {batch.image_id}: {error}")


def _simulated(artifact: str, backend: str) -> bool:
    """Whether FP16 is simulated: by the reference backend, for artifacts that compute in FP16."""
    return artifact in SIMULATED_FP16 and base.get(backend).is_reference


def _unoptimized(bundle: Bundle, artifact: str, threads: int | None) -> Detector:
    """The graph in ONNX Runtime without optimizations, FP16 simulated: the arithmetic that the file specifies."""
    manifest, path = bundle.manifest, bundle.require(GRAPHS[artifact].file)
    model = simulate_fp16(path) if artifact in SIMULATED_FP16 else path
    runner = OrtRunner(model, threads=threads, optimize=False)
    return Detector(runner, manifest.classes, manifest.input, manifest.output, stage=artifact)


def _decode(raw: RawOutputs, geometry: list[preprocess.Geometry], detector: Detector) -> list[Detections]:
    if not (np.isfinite(raw.logits).all() and np.isfinite(raw.boxes).all()):
        raise ModelError(
            f"{detector.stage} gives NaN or infinity: its file, or the weights that it was made from, are "
            "no use; run: edgedetr export BUNDLE, and where that changes nothing train again"
        )
    return decode(raw, geometry, detector.classes, detector.output)


def _no_detections() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
