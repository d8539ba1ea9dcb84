"""reference.npz: what the PyTorch model detects on the verify split, so that verifying needs no torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgedetr.bundle import Bundle, Manifest
from edgedetr.data.form import DetectionSet
from edgedetr.data.images import decode as decode_image
from edgedetr.evaluation.reference import Reference
from edgedetr.models.deploy import DeployGraph
from edgedetr.runtime.detections import Detections
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import prepare
from edgedetr.runtime.runner import RawOutputs

BATCH = 4           # pictures at a time; on a CPU larger batches are no faster


def reference(bundle: Bundle, graph: DeployGraph, dataset: DetectionSet,
              progress: Callable[[str, int, int], None] | None = None) -> None:
    """Run the graph over the split and add reference.npz to the bundle."""
    found = detect(bundle.manifest, graph, dataset, progress)
    weights = bundle.manifest.files["weights.safetensors"].sha256
    with bundle.add("reference.npz", stage="export", made_from=["weights.safetensors"]) as temporary:
        Reference.of(dataset, found, model=weights).save(temporary)


def detect(manifest: Manifest, graph: DeployGraph, dataset: DetectionSet,
           progress: Callable[[str, int, int], None] | None = None) -> dict[int, Detections]:
    """What the PyTorch graph finds in every picture of the split, by image id."""
    device = next(graph.parameters()).device
    found: dict[int, Detections] = {}
    with torch.no_grad():
        for start in range(0, len(dataset), BATCH):
            if progress:
                progress("reference", start, len(dataset))
            samples = dataset.samples[start:start + BATCH]
            batch, geometries = prepare([decode_image(sample.path) for sample in samples], manifest.input)
            logits, boxes = graph(torch.from_numpy(batch).to(device))
            raw = RawOutputs(logits.float().cpu().numpy(), boxes.float().cpu().numpy())
            detections = decode(raw, geometries, manifest.classes, manifest.output)
            found.update((sample.image_id, item) for sample, item in zip(samples, detections))
    if progress:
        progress("reference", len(dataset), len(dataset))
    return found
