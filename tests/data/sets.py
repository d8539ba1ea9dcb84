"""Small data sets on disk for tests: images of 40 x 30 pixels, and whatever annotations a test wants to spoil."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def put_image(path: Path, seed: int = 0) -> Path:
    """Noise of 40 x 30 pixels, different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tables(count: int = 2, **changes: object) -> dict:
    """COCO tables of images 0.jpg, 1.jpg, ..., with one object of class 1 and one of class 2 each."""
    boxes = ([4, 5, 10, 12], [20, 6, 8, 9])
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in range(count)],
        "annotations": [
            {"id": 2 * n + k, "image_id": n, "category_id": k + 1, "bbox": boxes[k], "iscrowd": 0}
            for n in range(count)
            for k in (0, 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        **changes,
    }


def coco(root: Path, split: str = "train", content: dict | None = None, count: int = 2, seed: int = 0) -> Path:
    for number in range(count):
        put_image(root / "images" / split / f"{number}.jpg", seed + number)
    text(root / "annotations" / f"{split}.json", json.dumps(tables(count) if content is None else content))
    return root


def yolo(
    root: Path,
    yaml: str | bytes = "names: [cat, dog]\ntrain: images/train\n",
    images: str = "images/train",
    labels: str = "labels/train",
    names: tuple[str, ...] = ("a", "b"),
    line: str = "1 0.5 0.5 0.25 0.2\n",
) -> Path:
    for seed, name in enumerate(names):
        put_image(root / images / f"{name}.jpg", seed)
        text(root / labels / f"{name}.txt", line)
    text(root / "data.yaml", yaml)
    return root


def xml(filename: str = "", name: str = "dog") -> str:
    said = f"<filename>{filename}</filename>" if filename else ""
    return (
        f"<annotation>{said}<object><name>{name}</name><bndbox><xmin>4</xmin><ymin>5</ymin><xmax>14</xmax>"
        "<ymax>17</ymax></bndbox></object></annotation>"
    )


def voc(root: Path, names: tuple[str, ...] = ("a", "b"), listing: str | bytes | None = None) -> Path:
    for seed, name in enumerate(names):
        put_image(root / "JPEGImages" / f"{name}.jpg", seed)
        text(root / "Annotations" / f"{name}.xml", xml(f"{name}.jpg"))
    if listing is not None:
        text(root / "ImageSets" / "Main" / "train.txt", listing)
    return root
