"""The reference run: PyTorch's detections on the verify split, stored as reference.npz, so that verify needs no torch.

An imported graph has no PyTorch model; its reference is its float32 ONNX file in ONNX Runtime.
"""

from __future__ import annotations

import logging

import torch

from edgedetr.artifacts import ONNX, REFERENCE, WEIGHTS
from edgedetr.bundle import Bundle, Manifest
from edgedetr.data.detection_set import DetectionSet
from edgedetr.data.images import decode as decode_image
from edgedetr.data.layouts import load
from edgedetr.evaluation.reference import Reference
from edgedetr.models.deploy import DeployGraph
from edgedetr.progress import Progress
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.bundle_detector import load as load_detector
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.preprocess import prepare

log = logging.getLogger(__name__)

BATCH = 4  # images at a time; on a CPU larger batches are no faster


def write_reference(
    bundle: Bundle, graph: DeployGraph, dataset: DetectionSet, progress: Progress | None = None
) -> None:
    """Run the graph over the split and add reference.npz to the bundle."""
    found = detect_with_pytorch(bundle.manifest, graph, dataset, progress)
    weights = bundle.manifest.files[WEIGHTS.file].sha256
    with bundle.add(REFERENCE.file, stage=REFERENCE.step, made_from=[WEIGHTS.file]) as temporary:
        Reference.of(dataset, found, model=weights).save(temporary)


def is_imported(bundle: Bundle) -> bool:
    """Whether the bundle's model was imported as an ONNX file, so that there is no PyTorch model."""
    files = bundle.manifest.files
    return ONNX.file in files and files[ONNX.file].stage == "import"


def write_reference_of_graph(bundle: Bundle, progress: Progress | None = None) -> None:
    """Add reference.npz of an imported graph, unless the bundle has a fresh one."""
    path, record = bundle.require(ONNX.file), bundle.manifest.data
    if record is None:
        log.warning("%s: no data recorded, so no reference.npz; import it again with --data DIR", bundle.path)
        return
    if bundle.has(REFERENCE.file):
        return
    log.warning("%s: the reference is model.onnx in ONNX Runtime: an imported graph has no PyTorch model", bundle.path)
    dataset = load(record.path, record.verify_split, classes=bundle.manifest.classes)
    found = detect_with_onnx(bundle, dataset, progress)
    with bundle.add(REFERENCE.file, stage=REFERENCE.step, made_from=[ONNX.file]) as temporary:
        Reference.of(dataset, found, model=bundle.manifest.files[path.name].sha256).save(temporary)


def detect_with_onnx(bundle: Bundle, dataset: DetectionSet, progress: Progress | None = None) -> dict[int, Detections]:
    """{image id: detections of model.onnx} for every image of the split."""
    detector = load_detector(bundle, backend="onnxruntime", stage=ONNX.id)
    found: dict[int, Detections] = {}
    for number, sample in enumerate(dataset.samples):
        found[sample.image_id] = detector([decode_image(sample.path)])[0]
        if progress:
            progress("reference", number + 1, len(dataset))
    return found


def detect_with_pytorch(
    manifest: Manifest, graph: DeployGraph, dataset: DetectionSet, progress: Progress | None = None
) -> dict[int, Detections]:
    """{image id: detections of the PyTorch graph} for every image of the split."""
    device = next(graph.parameters()).device
    found: dict[int, Detections] = {}
    with torch.no_grad():
        for start in range(0, len(dataset), BATCH):
            if progress:
                progress("reference", start, len(dataset))
            samples = dataset.samples[start : start + BATCH]
            batch, geometries = prepare([decode_image(sample.path) for sample in samples], manifest.input)
            logits, boxes = graph(torch.from_numpy(batch).to(device))
            raw = RawOutputs(logits.float().cpu().numpy(), boxes.float().cpu().numpy())
            detections = decode(raw, geometries, manifest.classes, manifest.output)
            found.update((sample.image_id, item) for sample, item in zip(samples, detections))
    if progress:
        progress("reference", len(dataset), len(dataset))
    return found
