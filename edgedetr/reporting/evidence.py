"""Everything the page shows, read from the bundle: the verdict, each stage's detections and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.artifacts import REFERENCE, REPORT, VERDICT, detections_file
from edgedetr.bundle import Bundle
from edgedetr.evaluation.coco_metrics import ClassMatches, Metrics, evaluate
from edgedetr.evaluation.reference import Reference, load_detections
from edgedetr.reporting.recorded import read_verdict
from edgedetr.reporting.tables import is_reference
from edgedetr.runtime.detections import Detections

RECALL = np.linspace(0, 1, 101)  # pycocotools' own 101 points


@dataclass(frozen=True)
class Stage:
    """One measured stage: its row of the verdict, its detections by image id, its metrics (not those by size)."""

    row: Mapping[str, Any]
    detections: Mapping[int, Detections]
    metrics: Metrics

    @property
    def label(self) -> str:
        return f"{self.row['name']} ({self.row['backend']})"

    @property
    def quantized(self) -> bool:
        return "int8" in self.row["name"]


@dataclass(frozen=True)
class Evidence:
    """A verified bundle. `stages` are those whose detections were recorded, the PyTorch reference first."""

    bundle: Bundle
    verdict: Mapping[str, Any]
    reference: Reference
    stages: tuple[Stage, ...]

    @property
    def worst(self) -> Stage | None:
        """The quantized stage that loses most, which is the one worth looking at."""
        quantized = [s for s in self.stages if s.quantized]
        return max(quantized, key=lambda s: s.row["drop"], default=None)


def read(bundle: Bundle) -> Evidence:
    """Read the results of `edgedetr verify`; BundleError when there are none or when they are damaged."""
    path = bundle.require(VERDICT.file)
    verdict = read_verdict(path, bundle.path)
    rows = [dict(stage) for stage in verdict["stages"]]
    reference = Reference.load(bundle.require(REFERENCE.file))
    stages = []
    for row in rows:
        if is_reference(row):
            found: Mapping[int, Detections] = reference.detections
        else:
            name = detections_file(row["name"], row["backend"])
            if name not in bundle.manifest.files:
                continue
            found = load_detections(bundle.require(name), reference.truth.classes)
        stages.append(Stage(row, found, evaluate(reference.truth, found, by_size=False)))
    stages.sort(key=lambda stage: not is_reference(stage.row))
    return Evidence(bundle, verdict, reference, tuple(stages))


def precision_recall(metrics: Metrics, threshold: int = 0) -> np.ndarray:
    """Mean interpolated precision over the classes at 101 recalls, as COCO averages it; `threshold` 0 is IoU 0.50.

    return  [101]  0..1; classes without ground truth leave the mean
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
    place = np.searchsorted(true / matches.objects.sum(), RECALL, side="left")
    return np.append(precision, 0.0)[place]


def report_path(bundle: Bundle) -> Path:
    """Where the page of this bundle lies."""
    return bundle.inside(REPORT.file)
