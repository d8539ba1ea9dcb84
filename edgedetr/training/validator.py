"""Scores the current weights: detections of the deployed graph on the select split, evaluated by pycocotools."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgedetr.bundle import InputContract, OutputContract
from edgedetr.data.detection_set import DetectionSet, Sample
from edgedetr.data.images import decode
from edgedetr.evaluation.coco_metrics import Metrics, evaluate
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel
from edgedetr.runtime import postprocess
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.preprocess import Geometry, resize


class Validator:
    """Runs a model on the select split.

    batch     images per call of the model
    cache_mb  resized images are kept in memory up to this size
    """

    def __init__(
        self, samples: DetectionSet, contract: InputContract, output: OutputContract, *, batch: int, cache_mb: int
    ) -> None:
        self.samples, self.contract, self.output, self.batch = samples, contract, output, batch
        self._free_bytes = cache_mb * 2**20
        self._cache: dict[int, tuple[Tensor, Geometry]] = {}

    def detect(self, model: DetrModel, *, rank: int = 0, world: int = 1) -> dict[int, Detections]:
        """Detections by image id, of every `world`-th image from `rank` on."""
        device = next(model.parameters()).device
        graph = DeployGraph(model, self.contract.height, self.contract.width, sampling="auto")
        found: dict[int, Detections] = {}
        mine = self.samples.samples[rank::world]
        with torch.inference_mode():
            for start in range(0, len(mine), self.batch):
                part = mine[start : start + self.batch]
                resized = [self._resized(sample) for sample in part]
                images = torch.stack([pixels for pixels, _ in resized]).to(device).float()
                logits, boxes = graph(images)
                raw = RawOutputs(logits.float().cpu().numpy(), boxes.float().cpu().numpy())
                geometries = [geometry for _, geometry in resized]
                decoded = postprocess.decode(raw, geometries, self.samples.classes, self.output)
                found |= {sample.image_id: detections for sample, detections in zip(part, decoded)}
        return found

    def measure(self, detections: dict[int, Detections]) -> Metrics:
        """AP of the detections of all images, by image id."""
        return evaluate(self.samples, detections)

    def _resized(self, sample: Sample) -> tuple[Tensor, Geometry]:
        """Pixels [3, H, W] uint8 at the size of the input, and how the image was resized."""
        if sample.image_id in self._cache:
            return self._cache[sample.image_id]
        pixels, geometry = resize(decode(sample.path), self.contract)
        entry = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), geometry
        if pixels.nbytes <= self._free_bytes:
            self._free_bytes -= pixels.nbytes
            self._cache[sample.image_id] = entry
        return entry
