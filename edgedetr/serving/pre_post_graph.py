"""What lies around the model, as standard operators: the resize before it, and the choice of objects after it.

The twins in numpy are runtime/preprocess.py and runtime/postprocess.py. Everything is float32: pixels, scores and
coordinates keep their digits whatever precision the model has.

The resize is AveragePool and Resize. Two matrix products with constant interpolation matrices are within one level of
255 as well, but take 142 ms where these take 33 (1080 x 1920 to 640 x 640, ONNX Runtime, one core), and a GPU rounds
the factors of a float32 product to TF32 unless it is told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from edgedetr.bundle import OutputContract
from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_builder import GraphBuilder
from edgedetr.onnx_graph.hardware_limits import LARGEST_TOP_K
from edgedetr.runtime.preprocess import PADDING, Geometry, averaged


@dataclass(frozen=True)
class Chosen:
    """Names of tensors: boxes [B, k, 4] cx, cy, w, h in 0..1 of the input; scores [B, k]; labels [B, k] int32."""

    boxes: str
    scores: str
    labels: str
    count: int


def planes_of_frames(part: GraphBuilder, frames: str) -> str:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W].

    TensorRT takes uint8 for inputs of a network alone, and only a Cast may read them (NvInfer.h, DataType::kUINT8).
    """
    return part.add("Transpose", part.add("Cast", frames, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])


def resize(part: GraphBuilder, planes: str, geometry: Geometry, output: str, batch: int = 1) -> None:
    """float32 [B, 3, source_height, source_width] -> `output` [B, 3, height, width], whole levels 0..255."""
    g = geometry
    kernel = [averaged(g.source_height, g.content_height), averaged(g.source_width, g.content_width)]
    size = [g.content_height, g.content_width]
    padding = [0, 0, 0, 0, 0, 0, g.height - size[0], g.width - size[1]]
    if kernel != [1, 1]:  # a pool without ceil_mode drops the same pixels at the right and bottom
        planes = part.add("AveragePool", planes, kernel_shape=kernel, strides=kernel)
    if [g.used_height // kernel[0], g.used_width // kernel[1]] != size:
        planes = part.add(
            "Resize",
            planes,
            "",
            "",
            part.constant([batch, 3, *size]),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    last = output if not any(padding) else ""
    planes = part.add("Round", planes, output=last)
    if any(padding):
        part.add("Pad", planes, part.constant(padding), part.constant(PADDING, np.float32), output=output)


def choose(part: GraphBuilder, logits: str, boxes: str, queries: int, width: int, output: OutputContract) -> Chosen:
    """The top_k objects, most confident first, as runtime/postprocess.py chooses them.

    logits [B, N, K*], boxes [B, N, 4]; queries N, width K*
    """
    if output.top_k > LARGEST_TOP_K:
        raise ExportError(
            f"the bundle keeps {output.top_k} objects of an image; TensorRT's TopK gives at most "
            f"{LARGEST_TOP_K}; train with fewer"
        )
    best = {"sigmoid": _best_of_all, "softmax": _best_class_per_query}[output.activation]
    query, scores, labels, count = best(part, logits, queries, width, output.top_k)
    column = part.add("Unsqueeze", query, part.constant([2]))
    every = part.add("Concat", column, column, column, column, axis=2)
    return Chosen(part.add("GatherElements", boxes, every, axis=1), scores, labels, count)


def _best_of_all(part: GraphBuilder, logits: str, queries: int, width: int, top_k: int) -> tuple[str, str, str, int]:
    """The best of N * K sigmoid scores; the order of logits is that of scores."""
    count = min(top_k, queries * width)
    flat = part.add("Reshape", logits, part.constant([0, queries * width]))
    best, place = part.add_many("TopK", flat, part.constant([count]), outputs=("", ""), axis=1)
    place = part.add("Cast", place, to=TensorProto.INT32)
    classes = part.constant(width, np.int32)
    query = part.add("Div", place, classes)
    labels = part.add("Sub", place, part.add("Mul", query, classes))
    return query, part.add("Sigmoid", best), labels, count


def _best_class_per_query(
    part: GraphBuilder, logits: str, queries: int, width: int, top_k: int
) -> tuple[str, str, str, int]:
    """The best class other than "no object", which is the last, of each query."""
    count = min(top_k, queries)
    probability = part.add("Softmax", logits, axis=2)
    objects = part.add("Slice", probability, part.constant([0]), part.constant([width - 1]), part.constant([2]))
    score, label = part.add_many("TopK", objects, part.constant([1]), outputs=("", ""), axis=2)
    shape = part.constant([0, queries])
    best, query = part.add_many(
        "TopK", part.add("Reshape", score, shape), part.constant([count]), outputs=("", ""), axis=1
    )
    query = part.add("Cast", query, to=TensorProto.INT32)
    label = part.add("Cast", part.add("Reshape", label, shape), to=TensorProto.INT32)
    return query, best, part.add("GatherElements", label, query, axis=1), count


def corners(
    part: GraphBuilder,
    boxes: str,
    factors: tuple[float, float],
    limits: tuple[float, float],
    order: tuple[int, int, int, int] = (0, 1, 2, 3),
) -> str:
    """cx, cy, w, h in 0..1 of the input -> corners times `factors` (x, y), clipped to 0..limits (x, y).

    Differences and products element by element: a product of matrices would be rounded to TF32, a pixel in a thousand.
    order   of x0, y0, x1, y1 in the result
    """
    cx, cy, w, h = part.add_many("Split", boxes, part.constant([1, 1, 1, 1]), outputs=("",) * 4, axis=2)
    half = part.constant([[[0.5]]], np.float32)
    w, h = part.add("Mul", w, half), part.add("Mul", h, half)
    sides = [part.add("Sub", cx, w), part.add("Sub", cy, h), part.add("Add", cx, w), part.add("Add", cy, h)]
    both = part.add("Concat", *(sides[i] for i in order), axis=2)
    scaled = part.add("Mul", both, part.constant([[[(factors * 2)[i] for i in order]]], np.float32))
    above = part.add("Max", scaled, part.constant([[[0.0]]], np.float32))
    return part.add("Min", above, part.constant([[[(limits * 2)[i] for i in order]]], np.float32))
