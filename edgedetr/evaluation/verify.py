"""Verify a bundle: the AP that each artifact loses against PyTorch on the same images, with an upper bound."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgedetr.artifacts import GRAPHS, ONNX, REFERENCE, VERDICT, detections_file, verified_pairs
from edgedetr.bundle import Bundle
from edgedetr.data import images
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import BundleError, DataError, UsageError
from edgedetr.evaluation import engine_verdict
from edgedetr.evaluation.artifacts_run import (
    ArtifactRun,
    candidates,
    load_split,
    open_artifact,
    run_artifacts,
    without_saturating_int8,
)
from edgedetr.evaluation.coco_metrics import Metrics, evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.judge import Judge
from edgedetr.evaluation.reference import GroundTruth, Reference, save_detections
from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict, write_verdict
from edgedetr.progress import Progress
from edgedetr.runtime.backends import base
from edgedetr.runtime.bundle_detector import warn_of_threads
from edgedetr.runtime.latency import warn_if_unsteady

log = logging.getLogger(__name__)


def verify(
    bundle: str | Path | Bundle,
    *,
    data: str | Path | None = None,
    max_drop: float | None = None,
    live: Callable[[Bundle, DetectionSet], Reference] | None = None,
    artifacts: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    threads: int | None = None,
    config: VerifyConfig | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Measure every artifact against PyTorch and judge it; a complete verdict is stored in the bundle.

    data       the data set's folder; None = the one that the bundle records. Its images must be, byte for byte, those
               that reference.npz was made from
    max_drop   largest accepted AP drop, points; None = the bundle's tolerance
    live       computes the reference again (with torch, which this module must not import) instead of reading
               reference.npz
    artifacts  ids such as "int8-cpu"; None = all that were exported
    backends   None = the engines that fit this device; without engines the CPU libraries
    threads    of one inference; None = the configuration's

    Where engines are verified, the result is a DeviceVerdict (see engine_verdict.py).
    Errors: BundleError, DataError, UsageError, EngineError before anything is measured.
    """
    bundle = Bundle.open(bundle)
    bundle.inside(VERDICT.file)  # refuse a linked folder before the work, not after it
    config = config or VerifyConfig(budget=bundle.manifest.budget)
    config = replace(config, budget=config.budget if max_drop is None else max_drop, threads=threads or config.threads)
    if not math.isfinite(config.budget):
        raise UsageError(f"the tolerance is {config.budget}; expected points of AP from 0 to 100")
    engines = engine_verdict.fitting_engines(bundle, artifacts, backends)
    on_cpu = [name for name in backends or () if not base.get(name).runs_engines]
    pairs = candidates(bundle, verified_pairs(), artifacts, on_cpu or None) if on_cpu or not engines else []
    pairs = pairs if backends else without_saturating_int8(pairs)
    if engines and not pairs:
        warn_of_threads(bundle, threads)
    dataset = load_split(bundle, data)
    reference = live(bundle, dataset) if live else stored_reference(bundle, dataset)
    metrics = evaluate(reference.truth, reference.detections, by_size=False)
    if metrics.ap is None:
        raise DataError(
            f"{dataset.root}: split {dataset.name!r} has no object to measure AP on; "
            f"run: edgedetr data check {dataset.root}"
        )
    runs = run_artifacts(
        bundle,
        dataset,
        pairs,
        threads=config.threads,
        reference_images=config.parity_images,
        progress=progress,
        engines=engines,
    )
    warn_if_unsteady({f"{run.artifact} {run.backend}": run.seconds for run in runs if run.seconds and not run.fault})
    verdicts = _judge(Judge(bundle, dataset, reference, metrics, config), runs, progress)
    complete = artifacts is None
    if engines:
        on_device = engine_verdict.conclude(bundle, config, verdicts, runs)
        if complete and not on_cpu:
            engine_verdict.record(bundle, on_device, runs)
        return on_device
    ours = [v for v in verdicts if not v.quantizer]
    verdict = Verdict(all(v.passed for v in ours), config.budget, max(v.drop_upper95 for v in ours), tuple(verdicts))
    if complete and backends is None:
        _record(bundle, verdict, runs)
    return verdict


def _judge(judge: Judge, runs: Sequence[ArtifactRun], progress: Progress | None) -> list[ArtifactVerdict]:
    verdicts = [judge.judge_reference()]
    for number, run in enumerate(runs):
        judged = judge.judge(run)
        verdicts.append(judged if run.engine is None else engine_verdict.judge_engine(run, run.engine, judged))
        if progress:
            progress("bootstrap", number + 1, len(runs))
    return verdicts


def evaluate_artifact(
    bundle: str | Path | Bundle,
    *,
    artifact: str = ONNX.id,
    backend: str | None = None,
    data: str | Path | None = None,
    split: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Metrics of one artifact on a labeled split; "torch" ("reference" of an import) is read from reference.npz."""
    bundle = Bundle.open(bundle)
    if artifact in ("torch", "reference"):
        for name, given in (("--backend", backend), ("--threads", threads)):
            if given is not None:
                raise UsageError(
                    f"{name} {given}: the detections of {artifact} are read from {REFERENCE.file}, and nothing is run; "
                    f"leave it out, or evaluate {ONNX.id}"
                )
        reference = Reference.load(bundle.require(REFERENCE.file))
        if (split is not None and split != reference.split) or data is not None:
            _require_same_images(reference, GroundTruth.of(load_split(bundle, data, split), digests=True), bundle)
        return evaluate(reference.truth, reference.detections)
    detector = open_artifact(bundle, artifact, backend, threads)
    dataset = load_split(bundle, data, split)
    found = {}
    for number, sample in enumerate(dataset.samples):
        found[sample.image_id] = detector([images.decode(sample.path)])[0]
        if progress:
            progress("eval", number + 1, len(dataset))
    return evaluate(dataset, found)


def stored_reference(bundle: Bundle, dataset: DetectionSet) -> Reference:
    reference = Reference.load(bundle.require(REFERENCE.file))
    _require_same_images(reference, GroundTruth.of(dataset, digests=True), bundle)
    return reference


def _require_same_images(reference: Reference, truth: GroundTruth, bundle: Bundle) -> None:
    """BundleError unless the reference was made from exactly these images and annotations."""
    hint = f"expected the files that reference.npz was made from; to make it again, run: edgedetr export {bundle.path}"
    known = dict(zip(reference.truth.image_ids.tolist(), reference.truth.digests.tolist()))
    here = dict(zip(truth.image_ids.tolist(), truth.digests.tolist()))
    names = dict(zip(truth.image_ids.tolist(), truth.names.tolist()))
    if known.keys() != here.keys():
        raise BundleError(
            f"{bundle.path}: reference.npz has {len(known)} images, the data set {len(here)}, and "
            f"{len(known.keys() ^ here.keys())} are not in both; {hint}"
        )
    changed = [image_id for image_id in known if known[image_id] != here[image_id]]
    if changed:
        raise BundleError(
            f"{bundle.path}: {names[changed[0]]} is not the image that reference.npz was made from "
            f"({len(changed)} of {len(known)} differ); {hint}"
        )
    old = reference.truth
    columns = ("image", "boxes", "labels", "crowd", "areas")
    if not all(np.array_equal(getattr(old, name), getattr(truth, name)) for name in columns):
        raise BundleError(f"{bundle.path}: the annotations have changed since reference.npz was made; {hint}")


def _record(bundle: Bundle, verdict: Verdict, runs: Sequence[ArtifactRun]) -> None:
    """Store the verdict and the detections of each artifact; on read-only storage only this record is lost."""
    sources = [REFERENCE.file] if REFERENCE.file in bundle.manifest.files else []
    try:
        for run in runs:
            name = detections_file(run.artifact, run.backend)
            with bundle.add(name, stage="verify", made_from=[*sources, GRAPHS[run.artifact].file]) as path:
                save_detections(path, run.detections)
        sources += dict.fromkeys(GRAPHS[run.artifact].file for run in runs)
        write_verdict(bundle, VERDICT.file, verdict, made_from=sources)
    except OSError as error:
        log.warning("%s: the verdict could not be stored (%s)", bundle.path, error)
