"""ONNX files that find objects which the test planted, in every form that detectors are exported in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

HEIGHT, WIDTH = 64, 96  # of the input: a swapped x and y would show
QUERIES = 30
# cx, cy, w, h in fractions: small ones and some at the borders, so that no other reading of the numbers is possible.
BOXES = np.array(
    [
        [0.10, 0.12, 0.20, 0.24],
        [0.85, 0.20, 0.30, 0.16],
        [0.50, 0.55, 0.10, 0.12],
        [0.30, 0.80, 0.24, 0.40],
        [0.90, 0.90, 0.16, 0.14],
        [0.62, 0.30, 0.06, 0.08],
    ]
)
LABELS = np.array([0, 2, 1, 2, 0, 1])
SCORES = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7])
SIZE = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])


def corners(boxes: np.ndarray) -> np.ndarray:
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([center - half, center + half], -1)


def written(boxes: np.ndarray, layout: str) -> np.ndarray:
    """cx, cy, w, h in another layout."""
    if layout == "xywh":
        return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    return corners(boxes) if layout == "xyxy" else boxes


@dataclass
class Planted:
    """logits [1, N, K*] and boxes [1, N, 4] (cx, cy, w, h in fractions), both moved a little by the image."""

    nodes: list
    constants: dict[str, np.ndarray]
    width: int

    def add(self, op: str, *inputs: str, out: str, **attributes) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], f"n{len(self.nodes)}", **attributes))
        return out

    def const(self, name: str, value) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def model(self, outputs, *, opset: int = 17, ir: int = 8, kind=TensorProto.FLOAT, extra=()) -> ModelProto:
        values = [helper.make_tensor_value_info("pixel_values", kind, [1, 3, HEIGHT, WIDTH]), *extra]
        results = [
            helper.make_tensor_value_info(name, of, None)
            for name, of in (item if isinstance(item, tuple) else (item, TensorProto.FLOAT) for item in outputs)
        ]
        graph = helper.make_graph(
            self.nodes,
            "g",
            values,
            results,
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def planted(
    *,
    softmax: bool = False,
    spare: bool = False,
    layout: str = "cxcywh",
    pixels: bool = False,
    boxes: np.ndarray = BOXES,
    quiet: float = -6.0,
) -> Planted:
    """Tensors "l" (class logits) and "b" (boxes, written as the arguments select, without a conversion in the graph).

    spare   one logit more than classes, which is never used
    quiet   the logit of what is no object, under sigmoid
    """
    rng = np.random.default_rng(3)
    every = np.concatenate([rng.uniform(0.3, 0.7, (QUERIES, 2)), rng.uniform(0.02, 0.3, (QUERIES, 2))], 1)
    rows = np.arange(0, QUERIES, QUERIES // len(boxes))[: len(boxes)]
    every[rows] = boxes
    width = 3 + (softmax or spare)
    logits = rng.normal(quiet, 0.3, (QUERIES, width))
    if softmax:
        logits = rng.normal(0, 0.3, (QUERIES, width))
        logits[:, -1] = 6
        logits[rows] = 0
        logits[rows, LABELS[: len(boxes)]] = 4 + SCORES[: len(boxes)] * 3
    else:
        logits[rows, LABELS[: len(boxes)]] = np.log(SCORES / (1 - SCORES))[: len(boxes)]
    value = written(every, layout) * (SIZE if pixels else 1)
    made = Planted(
        [],
        {"l0": logits[None].astype(np.float32), "b0": value[None].astype(np.float32), "tiny": np.float32(1e-5)},
        width,
    )
    made.add("ReduceMean", "pixel_values", out="m", keepdims=0)
    made.add("Mul", "m", "tiny", out="z")
    made.add("Add", "l0", "z", out="l")
    made.add("Add", "b0", "z", out="b")
    return made


def convert(made: Planted, layout: str, *, pixels: bool = False) -> str:
    """Nodes from "b", cx, cy, w, h in fractions, to another layout."""
    made.const("two_two", np.array([2, 2]))
    made.const("half", np.float32(0.5))
    made.nodes.append(helper.make_node("Split", ["b", "two_two"], ["c", "s"], "split", axis=2))
    made.add("Mul", "s", "half", out="h")
    made.add("Sub", "c", "h", out="low")
    made.add("Add", "c", "h", out="high")
    result = made.add("Concat", "low", "high" if layout == "xyxy" else "s", out="turned", axis=2)
    if pixels:
        result = made.add("Mul", "turned", made.const("size", SIZE.astype(np.float32)), out="scaled")
    return result


def labeled(root: Path, boxes: np.ndarray = BOXES) -> Path:
    """A COCO-layout set on whose images the planted objects are right."""
    rng = np.random.default_rng(5)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        images, objects = [], []
        for number in range(2):
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{split}{number}.png")
            images.append({"id": number, "file_name": f"{split}{number}.png", "height": HEIGHT, "width": WIDTH})
            for box, label in zip(written(boxes, "xywh") * SIZE, LABELS):
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": number,
                        "category_id": int(label),
                        "bbox": box.tolist(),
                        "area": float(box[2] * box[3]),
                        "iscrowd": 0,
                    }
                )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": objects,
                    "categories": [{"id": index, "name": name} for index, name in enumerate(("red", "green", "blue"))],
                }
            )
        )
    return root
