"""The pre/post graph in standard operators: the resize before the model, and the top-k selection after it.

runtime/preprocess.py and runtime/postprocess.py do the same in numpy. Everything here is float32, so that pixels,
scores and coordinates keep their digits whatever precision the model has.

The resize is AveragePool and Resize. Two matrix products with constant interpolation matrices are within one level of
255 as well, but take 142 ms instead of 33 (1080 x 1920 to 640 x 640, ONNX Runtime, one core), and by default a GPU
rounds the factors of a float32 product to TF32.
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
class Selected:
    """Names of tensors: boxes [B, k, 4] cx, cy, w, h in 0..1 of the input; scores [B, k]; labels [B, k] int32."""

    boxes: str
    scores: str
    labels: str
    count: int


def planes_of_frames(builder: GraphBuilder, frames: str) -> str:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W].

    TensorRT takes uint8 only for inputs of a network, and only a Cast may read them (NvInfer.h, DataType::kUINT8).
    """
    return builder.add("Transpose", builder.add("Cast", frames, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])


def resize(builder: GraphBuilder, planes: str, geometry: Geometry, output: str, batch: int = 1) -> None:
    """float32 [B, 3, source_height, source_width] -> `output` [B, 3, height, width], whole levels 0..255."""
    g = geometry
    kernel = [averaged(g.source_height, g.content_height), averaged(g.source_width, g.content_width)]
    size = [g.content_height, g.content_width]
    padding = [0, 0, 0, 0, 0, 0, g.height - size[0], g.width - size[1]]
    if kernel != [1, 1]:  # a pool without ceil_mode drops the same pixels at the right and bottom
        planes = builder.add("AveragePool", planes, kernel_shape=kernel, strides=kernel)
    if [g.used_height // kernel[0], g.used_width // kernel[1]] != size:
        planes = builder.add(
            "Resize",
            planes,
            "",
            "",
            builder.constant([batch, 3, *size]),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    last = output if not any(padding) else ""
    planes = builder.add("Round", planes, output=last)
    if any(padding):
        builder.add("Pad", planes, builder.constant(padding), builder.constant(PADDING, np.float32), output=output)


def select_top_k(
    builder: GraphBuilder, logits: str, boxes: str, queries: int, width: int, output: OutputContract
) -> Selected:
    """The top_k detections, most confident first, as runtime/postprocess.py selects them.

    logits [B, N, K*], boxes [B, N, 4]; queries N, width K*
    """
    if output.top_k > LARGEST_TOP_K:
        raise ExportError(
            f"the bundle keeps {output.top_k} detections of an image; TensorRT's TopK gives at most "
            f"{LARGEST_TOP_K}; train with fewer"
        )
    best = {"sigmoid": _best_of_all, "softmax": _best_class_per_query}[output.activation]
    query, scores, labels, count = best(builder, logits, queries, width, output.top_k)
    column = builder.add("Unsqueeze", query, builder.constant([2]))
    every = builder.add("Concat", column, column, column, column, axis=2)
    return Selected(builder.add("GatherElements", boxes, every, axis=1), scores, labels, count)


def _best_of_all(builder: GraphBuilder, logits: str, queries: int, width: int, top_k: int) -> tuple[str, str, str, int]:
    """The best of N * K sigmoid scores; the order of logits is that of scores."""
    count = min(top_k, queries * width)
    flat = builder.add("Reshape", logits, builder.constant([0, queries * width]))
    best, flat_index = builder.add_many("TopK", flat, builder.constant([count]), outputs=("", ""), axis=1)
    flat_index = builder.add("Cast", flat_index, to=TensorProto.INT32)
    classes = builder.constant(width, np.int32)
    query = builder.add("Div", flat_index, classes)
    labels = builder.add("Sub", flat_index, builder.add("Mul", query, classes))
    return query, builder.add("Sigmoid", best), labels, count


def _best_class_per_query(
    builder: GraphBuilder, logits: str, queries: int, width: int, top_k: int
) -> tuple[str, str, str, int]:
    """The best class other than "no object", which is the last, of each query."""
    count = min(top_k, queries)
    probability = builder.add("Softmax", logits, axis=2)
    objects = builder.add(
        "Slice", probability, builder.constant([0]), builder.constant([width - 1]), builder.constant([2])
    )
    score, label = builder.add_many("TopK", objects, builder.constant([1]), outputs=("", ""), axis=2)
    shape = builder.constant([0, queries])
    best, query = builder.add_many(
        "TopK", builder.add("Reshape", score, shape), builder.constant([count]), outputs=("", ""), axis=1
    )
    query = builder.add("Cast", query, to=TensorProto.INT32)
    label = builder.add("Cast", builder.add("Reshape", label, shape), to=TensorProto.INT32)
    return query, best, builder.add("GatherElements", label, query, axis=1), count


def corners(
    builder: GraphBuilder,
    boxes: str,
    factors: tuple[float, float],
    limits: tuple[float, float],
    order: tuple[int, int, int, int] = (0, 1, 2, 3),
) -> str:
    """cx, cy, w, h in 0..1 of the input -> corners times `factors` (x, y), clipped to 0..limits (x, y).

    Differences and products element by element: a product of matrices would be rounded to TF32, a pixel in a thousand.
    order   of x0, y0, x1, y1 in the result
    """
    cx, cy, w, h = builder.add_many("Split", boxes, builder.constant([1, 1, 1, 1]), outputs=("",) * 4, axis=2)
    half = builder.constant([[[0.5]]], np.float32)
    w, h = builder.add("Mul", w, half), builder.add("Mul", h, half)
    sides = [builder.add("Sub", cx, w), builder.add("Sub", cy, h), builder.add("Add", cx, w), builder.add("Add", cy, h)]
    both = builder.add("Concat", *(sides[i] for i in order), axis=2)
    scaled = builder.add("Mul", both, builder.constant([[[(factors * 2)[i] for i in order]]], np.float32))
    above = builder.add("Max", scaled, builder.constant([[[0.0]]], np.float32))
    return builder.add("Min", above, builder.constant([[[(limits * 2)[i] for i in order]]], np.float32))
