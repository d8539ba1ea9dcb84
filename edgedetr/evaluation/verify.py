"""The verdict: how many points each stage of a bundle lost against PyTorch, with a bound, on identical bytes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgedetr.artifacts import GRAPHS, REFERENCE, VERDICT, benched_pairs, detections_file, verified_pairs
from edgedetr.bundle import Bundle
from edgedetr.data import images
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import BundleError, DataError, UsageError
from edgedetr.evaluation import engine_verdict
from edgedetr.evaluation.artifacts_run import (
    ArtifactRun,
    Progress,
    candidates,
    load_split,
    open_artifact,
    run_artifacts,
    without_saturating_int8,
)
from edgedetr.evaluation.coco_metrics import Metrics, evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.reference import GroundTruth, Reference, save_detections
from edgedetr.evaluation.verdict import Judge, Verdict, megabytes
from edgedetr.runtime import preprocess
from edgedetr.runtime.backends import base
from edgedetr.runtime.bundle_detector import Detector, load, load_engine
from edgedetr.runtime.latency import measure, warn_if_unsteady

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArtifactTiming:
    """Milliseconds of one inference of one image, and the file's size."""

    name: str
    backend: str
    p50_ms: float
    p99_ms: float
    size_mb: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def verify(
    bundle: str | Path | Bundle,
    *,
    data: str | Path | None = None,
    max_drop: float | None = None,
    live: Callable[[Bundle, DetectionSet], Reference] | None = None,
    stages: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    threads: int | None = None,
    config: VerifyConfig | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Measure every delivered stage against torch and judge it; a complete verdict is recorded in the bundle.

    data       the data set's folder; None = the one the bundle records. Its images must be, byte for byte, those
               that reference.npz was made from
    max_drop   the budget in points; None = the bundle's
    live       makes the reference anew (with torch, so it lives above this floor) instead of reading reference.npz
    backends   None = the engines that fit this device, and without any the libraries of the CPU

    On engines the verdict is a DeviceVerdict (see device.py).
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    bundle.inside(VERDICT.file)  # where the verdict goes must not lead elsewhere; said before the work, not after it
    config = config or VerifyConfig(budget=bundle.manifest.budget)
    config = replace(config, budget=config.budget if max_drop is None else max_drop, threads=threads or config.threads)
    if not math.isfinite(config.budget):
        raise UsageError(f"the budget is {config.budget}; expected points of AP from 0 to 100")
    chosen = engine_verdict.fitting(bundle, stages, backends)
    on_cpu = [name for name in backends or () if not base.get(name).runs_engines]
    pairs = candidates(bundle, verified_pairs(), stages, on_cpu or None) if on_cpu or not chosen else []
    pairs = pairs if backends else without_saturating_int8(pairs)
    dataset = load_split(bundle, data)
    if live:
        reference = live(bundle, dataset)
    else:
        reference = Reference.load(bundle.require(REFERENCE.file))
        require_same_images(reference, GroundTruth.of(dataset, digests=True), bundle)
    torch = evaluate(reference.truth, reference.detections, by_size=False)
    if torch.ap is None:
        raise DataError(
            f"{dataset.root}: split {dataset.name!r} has no object to measure AP on; "
            f"run: edgedetr data check {dataset.root}"
        )
    runs = run_artifacts(
        bundle,
        dataset,
        pairs,
        threads=config.threads,
        oracle_images=config.parity_images,
        progress=progress,
        engines=chosen,
    )
    judge = Judge(bundle, dataset, reference, torch, config)
    verdicts = [judge.torch()]
    warn_if_unsteady({f"{run.stage} {run.backend}": run.seconds for run in runs if run.seconds and not run.fault})
    for number, run in enumerate(runs):
        judged = judge.stage(run)
        verdicts.append(judged if run.engine is None else engine_verdict.judge_engine(run, run.engine, judged))
        if progress:
            progress("bootstrap", number + 1, len(runs))
    if chosen:
        on_device = engine_verdict.conclude(bundle, config, verdicts, runs)
        if stages is None and not on_cpu:
            engine_verdict.record(bundle, on_device, runs)
        return on_device
    verdict = Verdict(
        all(v.passed for v in verdicts), config.budget, max(v.drop_upper95 for v in verdicts), tuple(verdicts)
    )
    if stages is None and backends is None:
        _record(bundle, verdict, runs)
    return verdict


def evaluate_artifact(
    bundle: str | Path | Bundle,
    *,
    stage: str = "onnx",
    backend: str | None = None,
    data: str | Path | None = None,
    split: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Metrics of one stage on a labeled split; "torch" ("reference" of an import) is read from reference.npz."""
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if stage in ("torch", "reference"):
        reference = Reference.load(bundle.require(REFERENCE.file))
        if (split is not None and split != reference.split) or data is not None:
            require_same_images(reference, GroundTruth.of(load_split(bundle, data, split), digests=True), bundle)
        return evaluate(reference.truth, reference.detections)
    detector = open_artifact(bundle, stage, backend, threads)
    dataset = load_split(bundle, data, split)
    found = {}
    for number, sample in enumerate(dataset.samples):
        found[sample.image_id] = detector([images.decode(sample.path)])[0]
        if progress:
            progress("eval", number + 1, len(dataset))
    return evaluate(dataset, found)


def bench(
    bundle: str | Path | Bundle,
    *,
    stages: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    rounds: int = 50,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[ArtifactTiming]:
    """Time the stages in turns in one process; float32 of OpenVINO with float32 arithmetic.

    backends   None = the engines that fit this device, and without any the libraries of the CPU
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = engine_verdict.fitting(bundle, stages, backends)
    on_cpu = [name for name in backends or () if not base.get(name).runs_engines]
    pairs = candidates(bundle, benched_pairs(), stages, on_cpu or None) if on_cpu or not chosen else []
    named = {pair: load(bundle, stage=pair[0], backend=pair[1], threads=threads) for pair in pairs}
    named |= {(engine.stage_name, "tensorrt"): load_engine(bundle, engine) for engine in chosen}
    sizes = {(stage, backend): megabytes(bundle, GRAPHS[stage].file) for stage, backend in pairs}
    sizes |= {(engine.stage_name, "tensorrt"): engine.told.plan_bytes / 1e6 for engine in chosen}
    contract = bundle.manifest.input
    noise = np.random.default_rng(0).integers(0, 256, (contract.height, contract.width, 3), dtype=np.uint8)
    batch, _ = preprocess.prepare([noise], contract)

    def once(detector: Detector) -> Callable[[], object]:
        return lambda: detector.run_raw(batch)

    timings = measure(
        {" ".join(pair): once(detector) for pair, detector in named.items()}, rounds=rounds, progress=progress
    )
    return [
        ArtifactTiming(*pair, timings[" ".join(pair)].p50_ms, timings[" ".join(pair)].p99_ms, sizes[pair])
        for pair in named
    ]


def require_same_images(reference: Reference, truth: GroundTruth, bundle: Bundle) -> None:
    """BundleError unless the reference was made from these very images and annotations."""
    hint = f"expected the files that reference.npz was made from; make it again with: edgedetr export {bundle.path}"
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


def _record(bundle: Bundle, verdict: Verdict, runs: list[ArtifactRun]) -> None:
    """Write the verdict and each stage's detections; a bundle on read-only storage only loses the record."""
    listed = bundle.manifest.files
    sources = [name for name in (REFERENCE.file,) if name in listed]
    try:
        for run in runs:
            name = detections_file(run.stage, run.backend)
            with bundle.add(name, stage="verify", made_from=[*sources, GRAPHS[run.stage].file]) as path:
                save_detections(path, run.detections)
        sources += dict.fromkeys(GRAPHS[run.stage].file for run in runs)
        with bundle.add(VERDICT.file, stage="verify", made_from=sources) as path:
            path.write_text(json.dumps(verdict.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("%s: the verdict could not be recorded (%s)", bundle.path, error)
