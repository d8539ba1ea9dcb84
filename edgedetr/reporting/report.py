"""The report: one self-contained HTML page about a verified bundle. It runs no model and loads nothing from the net."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.boxes import clip
from edgedetr.bundle import Bundle, atomic_write
from edgedetr.data.detection_set import display_names
from edgedetr.data.images import decode
from edgedetr.errors import DataError, MissingDependency
from edgedetr.packages import missing
from edgedetr.printable import printable
from edgedetr.reporting.contents import inspect_bundle
from edgedetr.reporting.differences import CONFIDENCE, OVERLAP, Difference, most_different
from edgedetr.reporting.evidence import RECALL, Evidence, precision_recall, read, report_path
from edgedetr.reporting.tables import stage_rows, verdict_sentence
from edgedetr.storage.reading import MEBIBYTE, read_bytes

IMAGES = 12  # drawn at the end of the page
LONGEST = 720  # pixels of the longer side of a drawn image; keeps the page near 1 MB
LARGEST_FILE = 256 * MEBIBYTE  # bytes of an image file
PACKAGES = ("edgedetr", "numpy", "onnxruntime", "openvino", "torch", "onnx", "pycocotools")


@dataclass(frozen=True)
class Box:
    """One drawn box, in pixels of the drawn image. kind: both, reference or other."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class DrawnImage:
    """One drawn image; `data` is a data: address of a JPEG, or empty with `trouble` saying why."""

    name: str
    width: int
    height: int
    data: str
    trouble: str
    boxes: tuple[Box, ...]
    score: float
    only_reference: int
    only_other: int


def write_report(bundle: Bundle, *, data: Path | None = None) -> Path:
    """Write report/index.html into the bundle and return its path.

    data    folder of the verify images, where they are no longer where the bundle recorded them
    Errors: BundleError before `edgedetr verify` has run. Images that are missing are named on the page.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        from edgedetr.reporting import figures
    except ImportError as error:
        raise MissingDependency(missing((error.name or "matplotlib").partition(".")[0], error)) from error
    path = report_path(bundle)
    evidence = read(bundle)
    verdict, manifest = evidence.verdict, bundle.manifest
    root = data or (Path(manifest.data.path) if manifest.data else None)
    # The names in a bundle are data, not markup: everything is escaped but the figures, which escape their own text.
    environment = Environment(
        loader=PackageLoader("edgedetr.reporting", "."),
        autoescape=True,
        finalize=_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    head, rows = stage_rows(verdict)
    page = environment.get_template("page.html").render(
        title=bundle.path.name,
        verdict=verdict,
        sentence=verdict_sentence(verdict),
        head=head,
        rows=rows,
        manifest=manifest,
        contents=inspect_bundle(bundle),
        truth=evidence.reference.truth,
        drops_figure=figures.drops(verdict["stages"], verdict["budget"]),
        latency_figure=figures.latency(verdict["stages"]),
        class_figure=figures.class_drops(display_names(manifest.classes), _class_drops(evidence)),
        curves_figure=figures.precision_recall(
            {s.label: (precision_recall(s.metrics), precision_recall(s.metrics, 5)) for s in evidence.stages}, RECALL
        )
        if evidence.stages
        else None,
        notes=_notes(verdict),
        worst=evidence.worst,
        images=_drawn_images(evidence, root),
        confidence=CONFIDENCE,
        overlap=OVERLAP,
        versions=_versions(),
    )
    bundle.clean()
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _safe(value: Any) -> Any:
    """Text of the page without marks of direction and control characters; figures are markup and stay."""
    return printable(value, lines=True) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _class_drops(evidence: Evidence) -> dict[str, list[float | None]]:
    """Points each class loses against the first stage (PyTorch), by stage."""
    if not evidence.stages:
        return {}
    reference, losses = evidence.stages[0].metrics.per_class, {}
    for stage in evidence.stages[1:]:
        now = stage.metrics.per_class
        losses[stage.label] = [
            None if reference[name] is None or now[name] is None else float(reference[name]) - float(now[name])  # type: ignore[arg-type]  # None is seen to above
            for name in reference
        ]
    return losses


def _notes(verdict: Mapping[str, Any]) -> list[str]:
    """What verify says of single stages: faults, and backends that do not compute what the graph says."""
    return [
        f"{stage['name']} ({stage['backend']}): {stage['note']}" for stage in verdict["stages"] if stage.get("note")
    ]


def _drawn_images(evidence: Evidence, root: Path | None) -> list[DrawnImage]:
    worst = evidence.worst
    if worst is None:
        return []
    truth = evidence.reference.truth
    place = {int(image_id): n for n, image_id in enumerate(truth.image_ids)}
    found = []
    for shown in most_different(evidence.reference.detections, worst.detections, IMAGES):
        n = place[shown.image_id]
        found.append(_drawn_image(shown, root, str(truth.names[n]), str(truth.digests[n]), truth.sizes[n]))
    return found


def _drawn_image(shown: Difference, root: Path | None, name: str, sha256: str, size: np.ndarray) -> DrawnImage:
    height, width = int(size[0]), int(size[1])
    scale = min(1.0, LONGEST / max(height, width))
    drawn_height, drawn_width = max(1, round(height * scale)), max(1, round(width * scale))
    data, trouble = _jpeg(root, name, sha256, drawn_height, drawn_width)
    reference, other = shown.reference, shown.other
    boxes = []
    for r, o in shown.pairs:
        text = f"{_name(reference, r)} {reference.confidence[r]:.2f} → {other.confidence[o]:.2f}"
        boxes.append(_box("both", reference.xyxy[r], scale, height, width, text))
    for r in shown.only_reference:
        text = f"{_name(reference, r)} {reference.confidence[r]:.2f}"
        boxes.append(_box("reference", reference.xyxy[r], scale, height, width, text))
    for o in shown.only_other:
        boxes.append(_box("other", other.xyxy[o], scale, height, width, f"{_name(other, o)} {other.confidence[o]:.2f}"))
    return DrawnImage(
        name,
        drawn_width,
        drawn_height,
        data,
        trouble,
        tuple(boxes),
        shown.score,
        len(shown.only_reference),
        len(shown.only_other),
    )


def _box(kind: str, xyxy: np.ndarray, scale: float, height: int, width: int, label: str) -> Box:
    x0, y0, x1, y1 = (float(v) * scale for v in clip(xyxy, height, width))
    return Box(kind, round(x0, 1), round(y0, 1), round(x1 - x0, 1), round(y1 - y0, 1), label)


def _name(detections: Any, index: int) -> str:
    return str(detections.data["class_name"][index])


def _jpeg(root: Path | None, name: str, sha256: str, height: int, width: int) -> tuple[str, str]:
    """The image as a data: address, and what is wrong where it cannot be had."""
    from PIL import Image

    if root is None:
        return "", f"{name}: the bundle does not say where its images are; name their folder by --data"
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            return "", f"{name} leads out of {root}, so it is not shown"
        if not path.is_file():
            return "", f"{name} is not in {root}; name its folder by --data"
        content = read_bytes(path, DataError, limit=LARGEST_FILE)
        if hashlib.sha256(content).hexdigest() != sha256:
            return "", f"{name} in {root} is not the image that was verified"
        pixels = decode(content)
    except (DataError, OSError, ValueError, RuntimeError) as error:  # a name with a NUL, too long, links in a circle
        return "", f"{name}: {error}"
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), ""


def _versions() -> list[tuple[str, str]]:
    """Versions of what wrote this page, where they are known."""
    found = []
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
