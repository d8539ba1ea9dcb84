"""Ground truth and detections to measure: the shared fixtures, random sets, and a labeled set with a bundle."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.evaluation import artifacts_run
from edgedetr.evaluation.reference import GroundTruth
from edgedetr.runtime.postprocess import Detections


def truth_of(images: list[dict], annotations: list[dict], categories: list[dict]) -> GroundTruth:
    """Ground truth from COCO records, xywh boxes."""
    categories = sorted(categories, key=lambda c: c["id"])
    class_index = {c["id"]: n for n, c in enumerate(categories)}
    image_index = {image["id"]: n for n, image in enumerate(images)}
    return GroundTruth(
        tuple(ClassInfo(n, c["id"], c["name"]) for n, c in enumerate(categories)),
        np.array([image["id"] for image in images], np.int64),
        np.array([f"{image['id']}.jpg" for image in images], str),
        np.array([f"{image['id']:064x}" for image in images], str),
        np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2),
        np.array([image_index[a["image_id"]] for a in annotations], np.int64),
        xyxy([a["bbox"] for a in annotations]),
        np.array([class_index[a["category_id"]] for a in annotations], np.int64),
        np.array([a.get("iscrowd", 0) for a in annotations], bool),
        np.array([a["area"] for a in annotations], np.float64),
    )


def found_of(results: list[dict], truth: GroundTruth) -> dict[int, Detections]:
    """Detections from COCO results; float64, so that pycocotools sees the file's numbers."""
    index = {c.category_id: c.index for c in truth.classes}
    rows: dict[int, list[dict]] = {int(i): [] for i in truth.image_ids}
    for result in results:
        rows[result["image_id"]].append(result)
    return {
        i: Detections(
            xyxy([r["bbox"] for r in row]),
            np.array([r["score"] for r in row], np.float64),
            np.array([index[r["category_id"]] for r in row], np.int64),
        )
        for i, row in rows.items()
    }


def xyxy(boxes: list[list[float]]) -> np.ndarray:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


@pytest.fixture(params=["cocoapi100", "cartucho", "fce-small"])
def recorded(request, shared_data: Path) -> tuple[GroundTruth, dict[int, Detections], dict]:
    """A fixture of ../shared/data/evalfix with pycocotools' own numbers for it."""
    truth, results, expected = (
        json.loads((shared_data / "evalfix" / request.param / f"{name}.json").read_text())
        for name in ("gt", "dt", "expected")
    )
    ground = truth_of(truth["images"], truth["annotations"], truth["categories"])
    return ground, found_of(results, ground), expected


@pytest.fixture
def random_set() -> Callable[..., tuple[GroundTruth, dict[int, Detections]]]:
    """A set with misses, false alarms, duplicates, wrong classes, crowds and equal scores."""

    def make(
        seed: int, images: int = 20, classes: int = 3, quality: float = 0.1, crowd: float = 0.1
    ) -> tuple[GroundTruth, dict[int, Detections]]:
        rng = np.random.default_rng(seed)
        records, annotations, results = [], [], []
        for number in range(images):
            image_id = int(1000 - 7 * number)  # not in the order of the ids
            records.append({"id": image_id, "height": 300, "width": 400})
            for _ in range(rng.integers(0, 6)):
                w, h = rng.uniform(8, 150, 2)
                box = [rng.uniform(0, 400 - w), rng.uniform(0, 300 - h), w, h]
                category = int(rng.integers(1, classes + 1)) * 5
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "bbox": box,
                        "area": w * h * 0.8,
                        "category_id": category,
                        "iscrowd": int(rng.uniform() < crowd),
                    }
                )
                for _ in range(rng.integers(0, 3)):
                    moved = np.array(box) + rng.normal(0, quality * min(w, h), 4)
                    label = category if rng.uniform() < 0.9 else int(rng.integers(1, classes + 1)) * 5
                    results.append(
                        {
                            "image_id": image_id,
                            "bbox": [*moved[:2], *np.maximum(moved[2:], 1)],
                            "category_id": label,
                            "score": round(float(rng.uniform(0.2, 1)), 1),
                        }
                    )
            for _ in range(rng.integers(0, 4)):
                results.append(
                    {
                        "image_id": image_id,
                        "bbox": [*rng.uniform(0, 200, 2), *rng.uniform(5, 100, 2)],
                        "category_id": int(rng.integers(1, classes + 1)) * 5,
                        "score": round(float(rng.uniform(0, 0.6)), 1),
                    }
                )
        categories = [{"id": 5 * k, "name": f"class {k}"} for k in range(1, classes + 1)]
        truth = truth_of(records, annotations, categories)
        return truth, found_of(results, truth)

    return make


@pytest.fixture(scope="session")
def tiny_graph() -> ModuleType:
    path = Path(__file__).parents[1] / "runtime" / "tiny_graph.py"
    spec = importlib.util.spec_from_file_location("tiny_graph", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLASSES = ("red", "blue")
BOXES = np.array([[0.25, 0.5, 0.3, 0.6], [0.7, 0.4, 0.4, 0.4], [0.5, 0.5, 0.8, 0.2]])  # cx, cy, w, h


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A COCO set of 24 one-colored images; each has one object, always at the first position, of its color's class."""
    root = tmp_path / "colors"
    (root / "images" / "test").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for n in range(24):
        name, label = f"{n:02}.png", n % 2
        shade = 130 + 5 * n
        pixels = np.zeros((32, 48, 3), np.uint8)
        pixels[..., 0 if label == 0 else 2] = shade
        Image.fromarray(pixels).save(root / "images" / "test" / name)
        images.append({"id": n + 1, "file_name": name, "height": 32, "width": 48})
        cx, cy, w, h = BOXES[0] * [48, 32, 48, 32]
        annotations.append(
            {
                "id": n + 1,
                "image_id": n + 1,
                "category_id": label + 1,
                "iscrowd": 0,
                "area": w * h,
                "bbox": [cx - w / 2, cy - h / 2, w, h],
            }
        )
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(CLASSES)]
    (root / "annotations" / "test.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


@pytest.fixture(autouse=True)
def exact_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs here hold floats, so every library is exact on every CPU; a CPU that saturates is played apart."""
    monkeypatch.setattr(artifacts_run, "int8_saturates", lambda: False)


@pytest.fixture
def make_bundle(tmp_path: Path, colors: Path, tiny_graph: ModuleType) -> Callable[..., Bundle]:
    """A bundle over `colors`; `weights` maps a file name to (liking of red by class red, of blue by class blue)."""

    def make(tolerance: float = 1.0, **likes: tuple[float, float]) -> Bundle:
        classes = tuple(ClassInfo(n, n + 1, name) for n, name in enumerate(CLASSES))
        bundle = Bundle.create(
            tmp_path / "colors.bundle",
            Manifest(
                "tiny",
                classes,
                InputContract(32, 48),
                OutputContract(),
                budget=tolerance,
                data=DataRecord(str(colors), "test", "test"),
            ),
        )
        for artifact, (red, blue) in likes.items():
            weight = np.zeros((3, 3, 2))
            weight[0, :, 0] = [red, 1, 0.5]
            weight[2, :, 1] = [blue, 1, 0.5]
            with bundle.add(FILES[artifact], stage="export") as path:
                tiny_graph.write(path, weight.reshape(3, -1), np.full((3, 2), -3.0), boxes=BOXES)
        return bundle

    return make


FILES = {
    "onnx": "model.onnx",
    "int8": "model.int8.onnx",
    "int8_cpu": "model.int8-cpu.onnx",
    "nncf": "model.int8-nncf.onnx",
}
