"""Write the report: one self-contained HTML page about a verified bundle. It runs no model and loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgedetr.artifacts import REPORT
from edgedetr.bundle import Bundle
from edgedetr.data.detection_set import display_names
from edgedetr.errors import MissingDependency
from edgedetr.packages import missing
from edgedetr.printable import printable
from edgedetr.quantization.search.search_report import HEAD as SEARCH_HEAD
from edgedetr.reporting import tables
from edgedetr.reporting.contents import inspect_bundle
from edgedetr.reporting.differences import CONFIDENCE, OVERLAP, DrawnImage, draw, most_different
from edgedetr.reporting.evidence import RECALL, Evidence, precision_recall, read_evidence
from edgedetr.reporting.quantization_results import read_quantization_results
from edgedetr.storage.atomic import atomic_write

IMAGES = 12  # drawn at the end of the page
PACKAGES = ("edgedetr", "numpy", "onnxruntime", "openvino", "torch", "onnx", "pycocotools")


@dataclass(frozen=True)
class Report:
    """The written page.

    path     of report/index.html in the bundle
    missing  for each image that could not be drawn, why
    """

    path: Path
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {"path": str(self.path), "missing": list(self.missing)}


def write_report(bundle: str | Path | Bundle, *, data: str | Path | None = None) -> Report:
    """Write report/index.html into the bundle.

    data    folder of the verify images; None = the folder that the bundle records

    Errors: BundleError before `edgedetr verify` has run. Images that are missing are named on the page.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        from edgedetr.reporting import figures
    except ImportError as error:
        raise MissingDependency(missing((error.name or "matplotlib").partition(".")[0], error)) from error
    bundle = Bundle.open(bundle)
    path = bundle.inside(REPORT.file)
    evidence = read_evidence(bundle)
    verdict, manifest = evidence.verdict, bundle.manifest
    recorded = manifest.data.path if manifest.data else None
    folder = data if data is not None else recorded
    images = _drawn_images(evidence, None if folder is None else Path(folder))
    curves = {
        artifact.label: (precision_recall(artifact.metrics), precision_recall(artifact.metrics, 5))
        for artifact in evidence.artifacts
    }
    # The names in a bundle are data, not markup: everything is escaped but the figures, which escape their own text.
    results = read_quantization_results(bundle)
    environment = Environment(
        loader=PackageLoader("edgedetr.reporting", "."),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    head, rows = tables.artifact_rows(verdict)
    page = environment.get_template("page.html").render(
        title=bundle.path.name,
        verdict=verdict,
        sentence=tables.verdict_sentence(verdict),
        head=head,
        rows=rows,
        manifest=manifest,
        contents=inspect_bundle(bundle),
        truth=evidence.reference.truth,
        drops_figure=figures.drops(verdict),
        latency_figure=figures.latency(verdict.artifacts),
        class_figure=figures.class_drops(display_names(manifest.classes), evidence.class_drops()),
        curves_figure=figures.precision_recall(curves, RECALL) if curves else None,
        integers=tables.integer_lines(verdict),
        notes=[*tables.notes(verdict), *results.unreadable],
        search=results.search,
        search_head=SEARCH_HEAD,
        search_figure=figures.search_candidates(results.search) if results.search else None,
        sensitivity=results.sensitivity,
        sensitivity_figure=figures.sensitivity_bars(results.sensitivity.rows) if results.sensitivity else None,
        worst=evidence.worst,
        images=images,
        confidence=CONFIDENCE,
        overlap=OVERLAP,
        versions=_versions(),
    )
    bundle.clean()
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Report(path, tuple(image.trouble for image in images if image.trouble))


def _printable(value: Any) -> Any:
    """Text without control characters and marks of direction; figures are markup and stay unchanged."""
    return printable(value, lines=True) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _drawn_images(evidence: Evidence, folder: Path | None) -> list[DrawnImage]:
    worst = evidence.worst
    if worst is None:
        return []
    shown = most_different(evidence.reference.detections, worst.detections, IMAGES)
    return [draw(difference, evidence.reference.truth, folder) for difference in shown]


def _versions() -> list[tuple[str, str]]:
    """Versions of the packages that made these results, where they are installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
