"""Evaluates published weights as this package computes them, and compares the AP with the published one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.data import layouts
from edgedetr.errors import DataError
from edgedetr.evaluation.artifacts_run import load_split
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.exporting.reference_run import detect_with_pytorch
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.weights import import_weights
from edgedetr.models.deploy import load_bundle_model
from edgedetr.progress import Progress
from edgedetr.published.published_detectors import find

TOLERANCE = 0.3  # points; between libraries, images are decoded and resized slightly differently


@dataclass(frozen=True)
class PublishedCheck:
    """The AP of published weights, measured and as published, in points.

    ap        None where it is undefined: no object on the images
    within    whether they differ by at most `tolerance`
    notes     how images were resized, and what else may explain a difference
    """

    name: str
    ap: float | None
    published_ap: float
    tolerance: float
    within: bool
    images: int
    split: str
    revision: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The keys of `edgedetr models --check --json`."""
        return asdict(self)


def check_published(
    name: str,
    data: str | Path,
    *,
    split: str | None = None,
    tolerance: float = TOLERANCE,
    accept_license: Sequence[str] = (),
    progress: Progress | None = None,
) -> PublishedCheck:
    """Load the weights of a published detector, evaluate them with PyTorch, and compare.

    data     folder of COCO val2017 (annotations/instances_val2017.json, images in val2017/), or another labeled set
    split    None = val, else test

    Errors: UsageError for an unknown name; ModelError, LicenseError, DataError.
    """
    row, split = find(name), split or _split(data)
    with tempfile.TemporaryDirectory(prefix="edgedetr-check-") as folder:
        options = ImportOptions(model=row.member, accept_license=accept_license)
        imported = import_weights(row.name, Path(folder) / "check.bundle", options)
        bundle = imported.bundle
        dataset = load_split(bundle, data, split)
        _, graph = load_bundle_model(bundle)
        found = detect_with_pytorch(bundle.manifest, graph, dataset, progress)
        ap = evaluate(dataset, found, by_size=False).ap
    within = ap is not None and abs(ap - row.ap) <= tolerance
    return PublishedCheck(
        row.name, ap, row.ap, tolerance, within, len(dataset), split, imported.revision, imported.notes
    )


def _split(data: str | Path) -> str:
    """The split to evaluate on. Errors: DataError without a usual one."""
    present = layouts.splits(data)
    found = next((name for name in ("val", "test") if name in present), None)
    if found is None:
        raise DataError(f"{data}: no split val or test (there: {', '.join(present) or 'none'}); name one by --split")
    return found
