"""Compares a small published detector of each family with transformers: `python tests/check_published.py`.

Each is imported by its name, exported, quantized, and run on a few rendered images beside the class of transformers
that its files are for. It needs a network, or a cache that `edgedetr fetch` filled; the workflow published.yml runs it
every week. The exit code is 0 where every detector held.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgedetr.api import export
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.data.synthetic import render
from edgedetr.errors import EdgedetrError
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.weights import import_weights
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.published.published_detectors import PublishedDetector, find, published
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.bundle_detector import load
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.postprocess import decode as detections_of
from edgedetr.runtime.preprocess import prepare

IMAGES, CALIBRATION = 4, 16  # compared; for the ranges of INT8
SCORE, MOST = 0.01, 20  # detections from this score on are compared, the best of an image
SCORES_APART = 0.01  # between float32 of two libraries; a swapped normalization or layer moves scores by tenths
BOXES_APART = 0.01  # of the image's side, likewise


@dataclass(frozen=True)
class Result:
    """What was found about one detector; `compared` is False where transformers has no class for its files."""

    name: str
    compared: bool
    lost: int
    of: int

    def describe(self) -> str:
        if not self.compared:
            return f"{self.name}: imported, exported, quantized; transformers does not read its files"
        return f"{self.name}: {self.of - self.lost} of {self.of} detections are those of transformers"


def smallest_of_each_family(rows: Iterable[PublishedDetector]) -> list[PublishedDetector]:
    """Of each family, the smallest detector that a program can download and everybody may use."""
    found: dict[str, PublishedDetector] = {}
    for row in rows:
        if row.page or not row.license.permissive or row.params is None:
            continue
        if row.family not in found or row.params < (found[row.family].params or 0):
            found[row.family] = row
    return list(found.values())


def check(name: str, folder: Path, scenes: Path) -> Result:
    """Import, export and quantize a published detector into `folder`, and compare its float32 with transformers.

    scenes   images, in images/train

    Errors: EdgedetrError of the step that failed.
    """
    row = find(name)
    bundle = import_weights(row.name, folder / "check.bundle", ImportOptions(model=row.member)).bundle
    export(bundle, int8=True, calib=scenes / "images" / "train", sets=(f"quant.images={CALIBRATION}",))
    bundle = Bundle.open(bundle.path)
    origin = WeightSource(row.name)
    config = origin.file_next_to("config.json")
    if config is None or "model_type" not in json.loads(config.read_text(encoding="utf-8")):
        return Result(name, False, 0, 0)
    images = [decode(path) for path in sorted((scenes / "images" / "test").iterdir())[:IMAGES]]
    theirs = transformers_detections(config.parent, bundle, images)
    ours = [load(bundle, backend="onnxruntime", stage="onnx")([image])[0] for image in images]
    lost = sum(count_lost(one, other, image.shape[:2]) for one, other, image in zip(theirs, ours, images))
    return Result(name, True, lost, sum(len(best(one)) for one in theirs))


def transformers_detections(folder: Path, bundle: Bundle, images: Sequence[np.ndarray]) -> list[Detections]:
    """What the class of transformers finds on the pixels that the bundle's own network gets."""
    from transformers import AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(str(folder)).eval()
    config = bundle.manifest.config
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    found = []
    for image in images:
        batch, geometries = prepare([image], bundle.manifest.input)
        with torch.no_grad():
            outputs = model(pixel_values=(torch.from_numpy(batch).float() / 255 - mean) / std)
        raw = RawOutputs(outputs.logits.numpy(), outputs.pred_boxes.numpy())
        found += detections_of(raw, geometries, bundle.manifest.classes, bundle.manifest.output)
    return found


def best(found: Detections) -> np.ndarray:
    """Indices of the detections that are compared."""
    order = np.argsort(-found.confidence, kind="stable")[:MOST]
    return order[found.confidence[order] >= SCORE]


def count_lost(theirs: Detections, ours: Detections, size: tuple[int, ...]) -> int:
    """How many of their best detections have no counterpart of the same class, place and score among ours."""
    lost = 0
    for index in best(theirs):
        apart = np.abs(ours.xyxy - theirs.xyxy[index]).max(axis=1) / max(size)
        same = (ours.class_id == theirs.class_id[index]) & (apart < BOXES_APART)
        lost += not (same & (np.abs(ours.confidence - theirs.confidence[index]) < SCORES_APART)).any()
    return lost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="published detectors; default: a small one of each family")
    names = parser.parse_args(arguments).names or [row.name for row in smallest_of_each_family(published().values())]
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        scenes = render(Path(scratch) / "scenes", train=CALIBRATION, val=1, verify=IMAGES, size=320, seed=1)
        for name in names:
            try:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    result = check(name, Path(folder), scenes)
                print(result.describe(), flush=True)
                if result.lost:
                    failed.append(name)
            except EdgedetrError as error:
                print(f"{name}: {error}", flush=True)
                failed.append(name)
            except (OSError, RuntimeError, ValueError, KeyError):  # of transformers: the others are still checked
                traceback.print_exc()
                failed.append(name)
    print(f"{len(names) - len(failed)} of {len(names)} held{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
