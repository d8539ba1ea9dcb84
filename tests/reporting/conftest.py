"""A verified bundle made by hand: drawn images, a reference, and an INT8 artifact that misses and invents boxes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.data.detection_set import DetectionSet, Sample
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.reference import Reference, save_detections
from edgedetr.runtime.postprocess import named

HOSTILE = '<img src=x onerror="alert(1)">&$\\frac{'
CLASSES = (ClassInfo(0, 7, "red cell"), ClassInfo(1, 3, HOSTILE), ClassInfo(2, 9, "never there"))
SIZE = (120, 160)  # height, width


@dataclass(frozen=True)
class Verified:
    """The bundle and what is in it."""

    bundle: Bundle
    image_root: Path
    reference: Reference
    lost: dict[int, int]  # image id -> boxes that the INT8 artifact dropped


def verified_bundle(root: Path, images: int = 8) -> Verified:
    """Images under root/data, bundle under root/made.bundle."""
    rng = np.random.default_rng(5)
    image_root, samples, reference, quantized, lost = root / "data", [], {}, {}, {}
    (image_root / "images").mkdir(parents=True)
    for image_id in range(1, images + 1):
        low = rng.uniform(5, 60, (4, 2))
        boxes = np.concatenate([low, low + rng.uniform(20, 55, (4, 2))], axis=1)
        labels = rng.integers(0, 2, 4)
        image = Image.fromarray(rng.integers(150, 190, (*SIZE, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(image)
        for box, label in zip(boxes, labels):
            pen.ellipse([float(v) for v in box], fill=(200, 60, 60) if label else (70, 90, 190))
        path = image_root / "images" / f"{image_id:03}.png"
        image.save(path)
        samples.append(
            Sample(
                image_id, path, *SIZE, boxes, labels, np.zeros(4, bool), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            )
        )
        found = boxes + rng.normal(0, 1, boxes.shape)
        scores = np.sort(rng.uniform(0.5, 0.99, 4))[::-1]
        reference[image_id] = named(
            found.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), CLASSES
        )
        drop = image_id % 4  # 1, 2, 3, 0, 1, ...
        lost[image_id] = drop
        keep = np.arange(4) >= drop
        quantized[image_id] = named(
            (found + rng.normal(0, 0.5, found.shape))[keep].astype(np.float32),
            scores[keep].astype(np.float32),
            labels[keep].astype(np.int64),
            CLASSES,
        )
    dataset = DetectionSet("test", image_root, tuple(samples), CLASSES)
    made = Reference.of(dataset, reference, model="0" * 64)
    bundle = Bundle.create(
        root / "made.bundle",
        Manifest(
            "rt_detr",
            CLASSES,
            InputContract(96, 128),
            OutputContract(),
            data=DataRecord(str(image_root), "test"),
            synthetic=True,
        ),
    )
    with bundle.add("reference.npz", stage="export") as path:
        made.save(path)
    ap = evaluate(made.truth, reference).ap
    after = evaluate(made.truth, quantized)
    assert ap is not None and after.ap is not None
    artifacts = [
        {
            "name": "torch",
            "backend": "pytorch",
            "passed": True,
            "ap": ap,
            "ap50": 90.0,
            "drop": 0.0,
            "drop_upper95": 0.0,
            "p50_ms": None,
            "p99_ms": None,
            "size_mb": 1.0,
        },
        {
            "name": "onnx",
            "backend": "onnxruntime",
            "passed": True,
            "ap": ap - 0.01,
            "ap50": 90.0,
            "drop": 0.01,
            "drop_upper95": 0.03,
            "p50_ms": 20.0,
            "p99_ms": 24.0,
            "size_mb": 1.0,
        },
        {
            "name": "int8-cpu",
            "backend": "onnxruntime",
            "passed": False,
            "ap": after.ap,
            "ap50": after.ap50,
            "drop": ap - after.ap,
            "drop_upper95": ap - after.ap + 3,
            "p50_ms": 9.0,
            "p99_ms": 11.0,
            "size_mb": 0.3,
            "note": "diverges <b>here</b>",
        },
    ]
    for name, found in (("onnx", reference), ("int8-cpu", quantized)):
        with bundle.add(
            f"results/detections-{name}-onnxruntime.npz", stage="verify", made_from=["reference.npz"]
        ) as path:
            save_detections(path, found)
    with bundle.add("results/verify.json", stage="verify") as path:
        path.write_text(json.dumps({"passed": False, "budget": 1.0, "certifiable": 2.5, "stages": artifacts}))
    return Verified(bundle, image_root, made, lost)


@pytest.fixture(scope="session")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    return verified_bundle(tmp_path_factory.mktemp("report"))
