"""The frame graph: resize, model and selection of detections as one ONNX graph for camera frames of one size.

`frames` [1, H, W, 3] uint8 RGB -> `boxes` [1, k, 4] float32 (x0, y0, x1, y1 in pixels of the frame), `scores` [1, k]
float32, `labels` [1, k] int32, most confident first. No work is left for the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, TensorProto, helper

from edgedetr.artifacts import BY_FILE, GRAPHS, ONNX, FrameGraph
from edgedetr.bundle import Bundle, Manifest
from edgedetr.errors import ExportError
from edgedetr.evaluation.agreement import detections_allclose
from edgedetr.image_size import check_size
from edgedetr.lint.lint import require_no_errors
from edgedetr.onnx_graph.bundle_graph import METADATA_PREFIX
from edgedetr.onnx_graph.graph_builder import GraphBuilder, merge, output_shape
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.runtime.arguments import check_word
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import decode, named
from edgedetr.runtime.preprocess import Geometry, prepare
from edgedetr.serving import pre_post_graph

LEVELS = 1  # largest accepted difference from the CPU's resize, of 255: both round, and ties may differ
PIXELS = 0.02  # largest accepted difference of a box side; float32 against float64 at 4000 px: 5e-4
SCORES = 1e-5  # of a score; float32 sigmoid or softmax: 1e-7


def with_frames(model: ModelProto, manifest: Manifest, height: int, width: int) -> ModelProto:
    """The graph `images` -> `logits`, `boxes` of a bundle, for frames of height x width pixels."""
    geometry = Geometry.of(*check_size((height, width), "frame"), manifest.input)
    queries, classes = output_shape(model, "logits")
    front, back = GraphBuilder("/frame"), GraphBuilder("/objects")
    pre_post_graph.resize(front, pre_post_graph.planes_of_frames(front, "frames"), geometry, output="images")
    selected = pre_post_graph.select_top_k(back, "logits", "boxes_of_input", queries, classes, manifest.output)
    factors = (
        geometry.width * geometry.used_width / geometry.content_width,
        geometry.height * geometry.used_height / geometry.content_height,
    )
    boxes = pre_post_graph.corners(back, selected.boxes, factors, (width, height))
    for tensor, name in ((boxes, "boxes"), (selected.scores, "scores"), (selected.labels, "labels")):
        back.add("Identity", tensor, output=name)
    value = helper.make_tensor_value_info
    return merge(
        model,
        front,
        back,
        [value("frames", TensorProto.UINT8, [1, height, width, 3])],
        [
            value("boxes", TensorProto.FLOAT, [1, selected.count, 4]),
            value("scores", TensorProto.FLOAT, [1, selected.count]),
            value("labels", TensorProto.INT32, [1, selected.count]),
        ],
        renamed={"boxes": "boxes_of_input"},
        metadata={f"{METADATA_PREFIX}frame": json.dumps({"height": height, "width": width})},
    )


def write_frames(bundle: Bundle, height: int, width: int, sources: Sequence[str] = (ONNX.file,)) -> list[str]:
    """Add a graph for frames of this size for each source graph of the bundle, and return the files' names."""
    names = []
    height, width = check_size((height, width), "frame")
    for source in sources:
        check_word(source, [graph.file for graph in GRAPHS.values()], "source")
        name = FrameGraph(BY_FILE[source], height, width).file
        names.append(name)
        if bundle.has(name):
            continue
        model = read_bundle_graph(bundle.require(source), ExportError)
        graph = with_frames(model, bundle.manifest, height, width)
        require_no_errors(graph, name)
        check(graph, bundle.manifest, height, width)
        with bundle.add(name, stage="export --frame", made_from=[source]) as temporary:
            temporary.write_bytes(graph.SerializeToString(deterministic=True))
    return names


def check(model: ModelProto, manifest: Manifest, height: int, width: int) -> None:
    """ExportError unless preprocessing and postprocessing in the graph equal the CPU's, for a frame of noise.

    Between them are the nodes of the bundle's own graph, unchanged.
    """
    inner = ("images", "logits", "boxes_of_input")
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    session = GraphSession(model, [*inner, "boxes", "scores", "labels"], optimize=True)
    found = session.run({"frames": frame[None]})
    images, geometries = prepare([frame], manifest.input, backend="numpy")
    levels = float(np.abs(found["images"] - images).max())
    if not levels <= LEVELS:
        raise ExportError(
            f"the resize inside the graph differs from the CPU's by {levels:g} of 255; expected at most "
            f"{LEVELS}; report this, it is a defect"
        )
    raw = RawOutputs(found["logits"], found["boxes_of_input"])
    expected = decode(raw, geometries, manifest.classes, manifest.output)[0]
    ours = named(found["boxes"][0], found["scores"][0], found["labels"][0].astype(np.int64), manifest.classes)
    if not detections_allclose(ours, expected, pixels=PIXELS, score=SCORES):
        raise ExportError(
            "the graph's detections differ from those of the CPU's postprocessing; report this, it is a defect"
        )
