"""Tiny bundles with random weights and a tiny image set: seconds from weights to INT8."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.models import FAMILY, build

PIXELS = 64
SMALL = {
    "rt_detr": {
        "backbone_width": 0.25,
        "hidden": 32,
        "heads": 4,
        "encoder_ffn": 64,
        "decoder_ffn": 64,
        "decoder_layers": 2,
        "queries": 20,
        "fusion_blocks": 1,
    },
    "detr": {
        "backbone": "resnet18",
        "backbone_width": 0.25,
        "hidden": 32,
        "heads": 4,
        "ffn": 64,
        "queries": 10,
        "encoder_layers": 1,
        "decoder_layers": 2,
    },
}
CLASSES = (ClassInfo(0, 7, "cat"), ClassInfo(1, 3, "dog"))


def write_dataset(root: Path) -> Path:
    """A COCO-layout set of random images: 10 in train, 3 in val."""
    rng = np.random.default_rng(5)
    for split, count in (("train", 10), ("val", 3)):
        (root / "images" / split).mkdir(parents=True)
        images, boxes = [], []
        for number in range(count):
            name = f"{split}{number}.png"
            Image.fromarray(rng.integers(0, 256, (50, 80, 3), dtype=np.uint8)).save(root / "images" / split / name)
            images.append({"id": number, "file_name": name, "height": 50, "width": 80})
            boxes.append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": (7, 3)[number % 2],
                    "bbox": [5, 6, 20, 30],
                    "area": 600,
                    "iscrowd": 0,
                }
            )
        (root / "annotations").mkdir(exist_ok=True)
        categories = [{"id": item.category_id, "name": item.name} for item in CLASSES]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def write_bundle(path: Path, member: str, data: Path | None) -> Bundle:
    """A bundle as training leaves it, with random weights that decide every top-k clearly."""
    config = FAMILY[member].config(backbone_weights="random", **SMALL[member])
    torch.manual_seed(3)
    detector = build(member, config, len(CLASSES))
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    record = DataRecord(str(data), "val", "train") if data else None
    bundle = Bundle.create(
        path,
        Manifest(
            model=member,
            classes=CLASSES,
            input=InputContract(PIXELS, PIXELS),
            output=OutputContract(config.activation),
            config=asdict(config),
            data=record,
        ),
    )
    with bundle.add("weights.safetensors", stage="train") as temporary:
        save_file(detector.state_dict(), temporary)
    return bundle


@pytest.fixture(scope="session")
def one_thread():
    """Tiny networks are slower on several threads, much slower where other work runs at the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory, dataset):
    """A function (member, path) -> a new bundle with weights only; they are made once."""
    made: dict[str, Bundle] = {}

    def copy(member: str, path: Path) -> Bundle:
        if member not in made:
            made[member] = write_bundle(tmp_path_factory.mktemp(member) / "weights.bundle", member, dataset)
        shutil.copytree(made[member].path, path)
        return Bundle.open(path)

    return copy


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory, fresh):
    """A function member -> its bundle, exported and quantized, made once; read only."""
    from edgedetr.exporting.config import ExportConfig
    from edgedetr.exporting.export import export
    from edgedetr.quantization.config import QuantConfig

    @cache
    def once(member: str) -> Bundle:
        bundle = fresh(member, tmp_path_factory.mktemp("exported") / f"{member}.bundle")
        return export(bundle, int8=True, config=ExportConfig(), quant=QuantConfig(images=8))

    return once


# pytest keeps one value of a fixture with parameters, and makes it again after another: hence the function above.
@pytest.fixture(scope="session", params=sorted(SMALL))
def exported(request, exported_once) -> Bundle:
    """A bundle of each member, exported and quantized; read only."""
    return exported_once(request.param)


@pytest.fixture(scope="session")
def float_detr(fresh, tmp_path_factory) -> Bundle:
    """A detr with reference.npz and model.onnx; read only."""
    from edgedetr.exporting.export import export

    return export(fresh("detr", tmp_path_factory.mktemp("float") / "detr.bundle"))
