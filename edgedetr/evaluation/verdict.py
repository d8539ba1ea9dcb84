"""How a stage is judged: its drop against torch with a bound, and whether its backend computes what the graph says."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import numpy as np

from edgedetr.artifacts import GRAPHS, ONNX, WEIGHTS
from edgedetr.bundle import Bundle
from edgedetr.data import images
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import EdgedetrError
from edgedetr.evaluation import bootstrap
from edgedetr.evaluation.agreement import Agreement, compare_detections
from edgedetr.evaluation.artifacts_run import ArtifactRun
from edgedetr.evaluation.coco_metrics import Metrics, evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.first_divergence import find_first_divergence
from edgedetr.evaluation.reference import Reference
from edgedetr.runtime import preprocess
from edgedetr.runtime.latency import Latency

log = logging.getLogger(__name__)

# Points of AP. A model below it finds next to nothing, so that it has nothing to lose, whatever the budget is.
USELESS = 1.0
# Below this share of matched objects a backend is named even where AP says nothing (it rests on ground truth).
MATCHED = 0.8


@dataclass(frozen=True)
class ArtifactVerdict:
    """One stage on one backend. AP, drops and bounds in points; drops are against the torch stage.

    passed         the bound is within the budget, the backend is sound, and the reference has something to lose
    drop_upper95   one-sided upper 95 % bound
    drop_lower95   one-sided lower 95 % bound: above the budget, the loss is real and not a small set's noise
    margin         drop_upper95 - drop: what this many images cannot tell apart
    p50_ms         one inference of one image, without preparing and decoding
    parity         detections against torch's, object by object
    oracle         the same against this graph's own arithmetic (ONNX Runtime without optimizations)
    oracle_drop    AP of the oracle minus AP of the backend, on the oracle's images
    note           "", or what went wrong and where
    """

    name: str
    backend: str
    passed: bool
    ap: float
    ap50: float
    drop: float
    drop_upper95: float
    p50_ms: float | None
    p99_ms: float | None
    size_mb: float | None
    drop_lower95: float = 0.0
    se: float = 0.0
    margin: float = 0.0
    ap75: float | None = None
    per_class: dict[str, float | None] | None = None
    images: int = 0
    parity: Agreement | None = None
    oracle: Agreement | None = None
    oracle_drop: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """All stages together.

    passed        every stage's bound is within the budget, and the reference (the first stage) has something to lose:
                  more AP than the budget, and than USELESS. Where it has not, no stage is passed, the reference neither
    certifiable   the smallest budget that these stages on these images pass: the largest bound
    """

    passed: bool
    budget: float
    certifiable: float
    stages: tuple[ArtifactVerdict, ...]

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages]}


class Judge:
    """Judges runs against one reference; the reference's resamples are computed once."""

    def __init__(
        self, bundle: Bundle, dataset: DetectionSet, reference: Reference, torch: Metrics, config: VerifyConfig
    ) -> None:
        self.bundle, self.dataset, self.reference, self.metrics, self.config = bundle, dataset, reference, torch, config
        ap = torch.ap or 0.0
        self.something_to_lose = ap > config.budget and ap >= USELESS
        counts = bootstrap.draw(len(reference.truth), config.bootstrap, config.seed)
        self.counts = bootstrap.with_identity(counts)
        self.resampled = bootstrap.resampled_ap(torch.matches, self.counts)

    def torch(self) -> ArtifactVerdict:
        weights, ap = self.bundle.manifest.files.get(WEIGHTS.file), self.metrics.ap or 0.0
        note = (
            ""
            if self.something_to_lose
            else (
                f"the reference itself reaches AP {ap:.2f}, "
                + (f"less than {USELESS:g}" if ap < USELESS else f"no more than the budget of {self.config.budget:g}")
                + ": there is nothing to lose, so that no stage can pass"
            )
        )
        name, backend = "torch", "pytorch"
        graph = self.bundle.manifest.files.get(ONNX.file)
        if weights is None and graph is not None and graph.stage == "import":
            name, backend, weights = "reference", "onnxruntime", graph
            told = f"an imported graph has no PyTorch model: the reference is {ONNX.file} in ONNX Runtime"
            note = f"{told}; {note}" if note else told
        return ArtifactVerdict(
            name,
            backend,
            self.something_to_lose,
            ap,
            self.metrics.ap50 or 0.0,
            0.0,
            0.0,
            None,
            None,
            weights.size / 1e6 if weights else None,
            ap75=self.metrics.ap75,
            per_class=self.metrics.per_class,
            images=len(self.reference.truth),
            note=note,
        )

    def stage(self, run: ArtifactRun) -> ArtifactVerdict:
        metrics = evaluate(self.reference.truth, run.detections, by_size=False)
        bound = bootstrap.compare(self.resampled, bootstrap.resampled_ap(metrics.matches, self.counts))
        latency = Latency.of(run.seconds) if run.seconds and not run.fault else None
        oracle, oracle_drop, note = self._against_oracle(run)
        return ArtifactVerdict(
            run.stage,
            run.backend,
            self.something_to_lose and bound.upper <= self.config.budget and not run.fault,
            metrics.ap or 0.0,
            metrics.ap50 or 0.0,
            bound.drop,
            bound.upper,
            latency.p50_ms if latency else None,
            latency.p99_ms if latency else None,
            megabytes(self.bundle, GRAPHS[run.stage].file),
            drop_lower95=bound.lower,
            se=bound.se,
            margin=bound.margin,
            ap75=metrics.ap75,
            per_class=metrics.per_class,
            images=len(self.reference.truth),
            parity=compare_detections(self.reference.detections, run.detections),
            oracle=oracle,
            oracle_drop=oracle_drop,
            note=note,
        )

    def _against_oracle(self, run: ArtifactRun) -> tuple[Agreement | None, float | None, str]:
        """Does this backend compute what the graph says? Judged on the images that the oracle saw."""
        if run.fault or not run.oracle:
            return None, None, run.fault
        parity = compare_detections(run.oracle, run.detections)
        truth = self.reference.truth.subset(run.oracle)
        theirs, ours = (
            evaluate(truth, {i: found[i] for i in run.oracle}, by_size=False) for found in (run.oracle, run.detections)
        )
        bound = bootstrap.paired(theirs.matches, ours.matches, resamples=self.config.bootstrap, seed=self.config.seed)
        drop = bound.drop if np.isfinite(bound.drop) else None
        # More than the budget and more than chance, or objects that are simply not there any more.
        real = drop is not None and drop > self.config.budget and bound.lower > 0
        if not real and (parity.matched is None or parity.matched >= MATCHED):
            return parity, drop, ""
        matched = "" if parity.matched is None else f", {100 * parity.matched:.0f} % of its objects matched"
        note = (
            f"{run.backend} departs from the arithmetic of {GRAPHS[run.stage].file} (ONNX Runtime without "
            f"optimizations): AP {-bound.drop:+.1f}{matched}, on {len(truth)} images"
        )
        where = self._where(run)
        log.warning("%s%s", note, where)
        return parity, drop, note + where

    def _where(self, run: ArtifactRun) -> str:
        picture = images.decode(self.dataset.samples[0].path)
        batch, _ = preprocess.prepare([picture], self.bundle.manifest.input)
        try:
            model = self.bundle.require(GRAPHS[run.stage].file)
            found = find_first_divergence(model, run.backend, batch, threads=self.config.threads)
        except EdgedetrError as error:
            return f"; the node was not looked for: {error}"
        return f"; first at {found}" if found else ""


def megabytes(bundle: Bundle, name: str) -> float:
    """Size of a file of the bundle, MB."""
    return bundle.manifest.files[name].size / 1e6
