"""Judge one artifact: its AP drop against the reference with a bound, and whether its backend computes the graph."""

from __future__ import annotations

import logging

import numpy as np

from edgedetr.artifacts import GRAPHS, ONNX, WEIGHTS, Artifact
from edgedetr.bundle import Bundle
from edgedetr.data import images
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import EdgedetrError, EngineError
from edgedetr.evaluation import bootstrap
from edgedetr.evaluation.agreement import Agreement, compare_detections
from edgedetr.evaluation.artifacts_run import ArtifactRun
from edgedetr.evaluation.coco_metrics import Metrics, evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.first_divergence import find_first_divergence, find_sharp_divergence
from edgedetr.evaluation.realized_precision import RealizedPrecision, realized_by_engine, realized_precision
from edgedetr.evaluation.reference import Reference
from edgedetr.evaluation.verdict import ArtifactVerdict
from edgedetr.runtime import preprocess
from edgedetr.runtime.backends.base import PEER_NOTE
from edgedetr.runtime.cure_record import about_cures
from edgedetr.runtime.latency import Latency
from edgedetr.runtime.onnx_bytes import metadata, read
from edgedetr.storage.reading import read_text

log = logging.getLogger(__name__)

# Points of AP. A model below it detects next to nothing, so it has nothing to lose at any tolerance.
LEAST_AP = 1.0
# Below this fraction of matched objects a backend is reported even where AP, which rests on few objects, is silent.
LEAST_MATCHED = 0.8


class Judge:
    """Judges runs against one reference, whose bootstrap resamples are computed once."""

    def __init__(
        self, bundle: Bundle, dataset: DetectionSet, reference: Reference, metrics: Metrics, config: VerifyConfig
    ) -> None:
        self.bundle, self.dataset, self.reference, self.metrics, self.config = (
            bundle,
            dataset,
            reference,
            metrics,
            config,
        )
        ap = metrics.ap or 0.0
        self.something_to_lose = ap > config.budget and ap >= LEAST_AP
        self.counts = bootstrap.with_identity(bootstrap.draw(len(reference.truth), config.bootstrap, config.seed))
        self.resampled = bootstrap.resampled_ap(metrics.matches, self.counts)

    def judge_reference(self) -> ArtifactVerdict:
        """The reference's own row: PyTorch, or the imported ONNX file where the bundle has no PyTorch model."""
        weights, ap = self.bundle.manifest.files.get(WEIGHTS.file), self.metrics.ap or 0.0
        note = ""
        if not self.something_to_lose:
            limit = (
                f"less than {LEAST_AP:g}" if ap < LEAST_AP else f"no more than the tolerance of {self.config.budget:g}"
            )
            note = f"the reference itself reaches AP {ap:.2f}, {limit}: it has nothing to lose, so no artifact can pass"
        name, backend = "torch", "pytorch"
        graph = self.bundle.manifest.files.get(ONNX.file)
        if weights is None and graph is not None and graph.stage == "import":
            name, backend, weights = "reference", "onnxruntime", graph
            imported = f"an imported graph has no PyTorch model: the reference is {ONNX.file} in ONNX Runtime"
            note = f"{imported}; {note}" if note else imported
        return ArtifactVerdict(
            name,
            backend,
            self.something_to_lose,
            ap,
            self.metrics.ap50 or 0.0,
            drop=0.0,
            drop_upper95=0.0,
            size_mb=weights.size / 1e6 if weights else None,
            ap75=self.metrics.ap75,
            per_class=self.metrics.per_class,
            images=len(self.reference.truth),
            note=note,
        )

    def judge(self, run: ArtifactRun) -> ArtifactVerdict:
        metrics = evaluate(self.reference.truth, run.detections, by_size=False)
        bound = bootstrap.compare(self.resampled, bootstrap.resampled_ap(metrics.matches, self.counts))
        latency = Latency.of(run.seconds) if run.seconds and not run.fault else None
        reference_run, reference_run_drop, note = self._against_reference_run(run)
        artifact = GRAPHS[run.artifact]
        if artifact.precision == "int8":
            note = "; ".join(filter(None, (*self._about(artifact), note)))
        integers = self._integers(run)
        if integers is not None and integers.finding():
            note = "; ".join(filter(None, [note, integers.finding()]))
        return ArtifactVerdict(
            run.artifact,
            run.backend,
            self.something_to_lose and bound.upper <= self.config.budget and not run.fault,
            metrics.ap or 0.0,
            metrics.ap50 or 0.0,
            drop=bound.drop,
            drop_upper95=bound.upper,
            p50_ms=latency.p50_ms if latency else None,
            p99_ms=latency.p99_ms if latency else None,
            size_mb=self.bundle.manifest.files[artifact.file].size / 1e6,
            drop_lower95=bound.lower,
            se=bound.se,
            margin=bound.margin,
            ap75=metrics.ap75,
            per_class=metrics.per_class,
            images=len(self.reference.truth),
            agreement=compare_detections(self.reference.detections, run.detections),
            reference_run=reference_run,
            reference_run_drop=reference_run_drop,
            note=note,
            quantizer=artifact.quantizer,
            integers=integers,
        )

    def _about(self, artifact: Artifact) -> list[str]:
        """What the export recorded in an INT8 graph: of another quantizer, and of the known faults it was cured of."""
        if artifact.quantizer:
            return [metadata(read(self.bundle.require(artifact.file))[0]).get(PEER_NOTE, "")]
        return about_cures(self.bundle, artifact.file)

    def _integers(self, run: ArtifactRun) -> RealizedPrecision | None:
        """Which quantized layers the backend runs in integers; None also for a simulation, which runs none."""
        if run.fault or run.simulated:
            return None
        graph = self.bundle.require(GRAPHS[run.artifact].file)
        try:
            if run.engine is None:
                return realized_precision(graph, run.backend, threads=self.config.threads)
            layers = run.engine.path.with_suffix(".layers.json")
            return realized_by_engine(graph, read_text(layers, EngineError)) if layers.exists() else None
        except EdgedetrError as error:
            log.warning("%s on %s: which layers run in integers is not known: %s", run.artifact, run.backend, error)
            return None

    def _against_reference_run(self, run: ArtifactRun) -> tuple[Agreement | None, float | None, str]:
        """Compare with the unoptimized run of the same graph, on its images: agreement, AP drop in points, note."""
        if run.fault or not run.reference_run:
            return None, None, run.fault
        agreement = compare_detections(run.reference_run, run.detections)
        truth = self.reference.truth.subset(run.reference_run)
        unoptimized = evaluate(truth, run.reference_run, by_size=False)
        optimized = evaluate(truth, {i: run.detections[i] for i in run.reference_run}, by_size=False)
        bound = bootstrap.paired(
            unoptimized.matches, optimized.matches, resamples=self.config.bootstrap, seed=self.config.seed
        )
        drop = bound.drop if np.isfinite(bound.drop) else None
        # More than the tolerance and more than chance; or objects that are no longer detected.
        significant = drop is not None and drop > self.config.budget and bound.lower > 0
        if not significant and (agreement.matched is None or agreement.matched >= LEAST_MATCHED):
            return agreement, drop, ""
        matched = "" if agreement.matched is None else f", {100 * agreement.matched:.0f} % of its objects matched"
        note = (
            f"{run.backend} does not compute what {GRAPHS[run.artifact].file} contains (against ONNX Runtime without "
            f"optimizations): AP {-bound.drop:+.1f}{matched}, on {len(truth)} images"
        )
        where = self._where(run)
        log.warning("%s%s", note, where)
        return agreement, drop, note + where

    def _where(self, run: ArtifactRun) -> str:
        """The end of a note: the first node whose values differ, found on the first image."""
        pixels = images.decode(self.dataset.samples[0].path)
        batch, _ = preprocess.prepare([pixels], self.bundle.manifest.input)
        try:
            model = self.bundle.require(GRAPHS[run.artifact].file)
            sharp = find_sharp_divergence(model, run.backend, batch, threads=self.config.threads)
            found = sharp or find_first_divergence(model, run.backend, batch, threads=self.config.threads)
        except EdgedetrError as error:
            return f"; the first divergence was not searched: {error}"
        return f"; first divergence at {found}" if found else ""
