"""Read from a bundle what the page shows: the verdict, the detections of each artifact, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgedetr.artifacts import REFERENCE, VERDICT, detections_file
from edgedetr.bundle import Bundle
from edgedetr.evaluation.coco_metrics import ClassMatches, Metrics, evaluate
from edgedetr.evaluation.reference import Reference, load_detections
from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict, read_verdict
from edgedetr.runtime.postprocess import Detections

RECALL = np.linspace(0, 1, 101)  # the 101 points of pycocotools


@dataclass(frozen=True)
class MeasuredArtifact:
    """One artifact with its verdict, its detections by image id, and its metrics (without those by object size)."""

    verdict: ArtifactVerdict
    detections: Mapping[int, Detections]
    metrics: Metrics

    @property
    def label(self) -> str:
        return self.verdict.label


@dataclass(frozen=True)
class Evidence:
    """A verified bundle. `artifacts` are those whose detections were recorded, the reference first."""

    bundle: Bundle
    verdict: Verdict
    reference: Reference
    artifacts: tuple[MeasuredArtifact, ...]

    @property
    def worst(self) -> MeasuredArtifact | None:
        """The INT8 artifact of ours that loses most: its differences are shown as images."""
        quantized = [one for one in self.artifacts if "int8" in one.verdict.name and not one.verdict.quantizer]
        return max(quantized, key=lambda artifact: artifact.verdict.drop, default=None)

    def class_drops(self) -> dict[str, list[float | None]]:
        """AP points that each class loses against the reference, by artifact label; None without ground truth."""
        if not self.artifacts:
            return {}
        before = self.artifacts[0].metrics.per_class
        return {
            artifact.label: [_difference(ap, artifact.metrics.per_class[name]) for name, ap in before.items()]
            for artifact in self.artifacts[1:]
        }


def read_evidence(bundle: Bundle) -> Evidence:
    """Read the results of `edgedetr verify`. Errors: BundleError where they are missing or damaged."""
    verdict = read_verdict(bundle.require(VERDICT.file), bundle.path)
    reference = Reference.load(bundle.require(REFERENCE.file))
    artifacts = []
    for artifact in verdict.artifacts:
        if artifact.is_reference:
            found: Mapping[int, Detections] = reference.detections
        else:
            name = detections_file(artifact.name, artifact.backend)
            if name not in bundle.manifest.files:
                continue
            found = load_detections(bundle.require(name), reference.truth.classes)
        artifacts.append(MeasuredArtifact(artifact, found, evaluate(reference.truth, found, by_size=False)))
    artifacts.sort(key=lambda artifact: not artifact.verdict.is_reference)
    return Evidence(bundle, verdict, reference, tuple(artifacts))


def precision_recall(metrics: Metrics, threshold: int = 0) -> np.ndarray:
    """Mean interpolated precision over the classes at 101 recalls, as COCO averages it; `threshold` 0 is IoU 0.50.

    return  [101]  0..1; classes without ground truth are left out of the mean
    """
    curves = [_class_curve(matches, threshold) for matches in metrics.matches.classes if matches.objects.sum()]
    return np.mean(curves, axis=0) if curves else np.zeros_like(RECALL)


def _class_curve(matches: ClassMatches, threshold: int) -> np.ndarray:
    hit, ignored = matches.hit[threshold], matches.ignored[threshold]
    true, false = np.cumsum(hit & ~ignored), np.cumsum(~hit & ~ignored)
    if not len(true):
        return np.zeros_like(RECALL)
    precision = true / np.maximum(true + false, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
    index = np.searchsorted(true / matches.objects.sum(), RECALL, side="left")
    return np.append(precision, 0.0)[index]


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
