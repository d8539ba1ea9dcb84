"""Write the files of DeepStream's nvinfer: a graph for a parser that DeepStream ships, a configuration, the labels.

The parser is NvDsInferParseCustomTfSSD of libnvds_infercustomparser.so (source: sources/libs/nvdsinfer_customparser/
nvdsinfer_custombboxparser.cpp of the SDK; the same function in DeepStream 5 and in 9). It finds its tensors by name,
all float32 and without the batch axis: `num_detections` [1], `detection_boxes` [k, 4] (y0, x0, y1, x1 in 0..1 of the
network's input), `detection_scores` [k] and `detection_classes` [k]. Other parsers of that library find outputs by
position (EfficientDetTAO, BatchedNMSTLT), or have four fixed classes of which they drop the first (DDETRTAO).

nvinfer's input is y = net-scale-factor * (x - offset) of RGB planes; here the identity, since the graph normalizes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from edgedetr.artifacts import ENGINE_GRAPHS, ONNX
from edgedetr.bundle import Bundle, InputContract, Manifest
from edgedetr.errors import ExportError
from edgedetr.image_size import check_size
from edgedetr.lint.lint import require_no_errors
from edgedetr.onnx_graph.graph_builder import GraphBuilder, batch_of, merge, output_shape
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.printable import one_line
from edgedetr.runtime.arguments import check_word
from edgedetr.runtime.preprocess import Geometry
from edgedetr.serving import pre_post_graph
from edgedetr.serving.labels import write_labels
from edgedetr.storage.atomic import atomic_write

log = logging.getLogger(__name__)

PARSER = "NvDsInferParseCustomTfSSD"
LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser.so"
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}  # nvinfer's numbers
MODES = {graph.file: NETWORK_MODES[precision] for precision, graph in ENGINE_GRAPHS.items()}
MODEL = "model.onnx"  # written next to the configuration
CONFIDENCE = 0.25  # lowest score that nvinfer passes on; the default of edgedetr predict


@dataclass(frozen=True)
class DeepStreamFiles:
    """The written files: the configuration of nvinfer, the graph, the labels."""

    config: Path
    model: Path
    labels: Path


def with_parser_outputs(model: ModelProto, manifest: Manifest, frame: tuple[int, int] | None = None) -> ModelProto:
    """The graph `images` -> `logits`, `boxes` of a bundle, with the outputs of the parser.

    frame   height and width of the camera's frames: the input is then a whole frame (float32 planes), and the graph
            contains the resize
    """
    contract, batch = manifest.input, batch_of(model)
    height, width = frame or (contract.height, contract.width)
    queries, classes = output_shape(model, "logits")
    front, back = GraphBuilder("/frame"), GraphBuilder("/objects")
    factors = (1.0, 1.0)
    if frame is not None:
        batch = 1
        geometry = Geometry.of(height, width, contract)
        pre_post_graph.resize(front, "frame", geometry, output="images")
        factors = (
            geometry.width * geometry.used_width / geometry.content_width / width,
            geometry.height * geometry.used_height / geometry.content_height / height,
        )
    selected = pre_post_graph.select_top_k(back, "logits", "boxes", queries, classes, manifest.output)
    boxes = pre_post_graph.corners(back, selected.boxes, factors, (1.0, 1.0), order=(1, 0, 3, 2))
    labels = back.add("Cast", selected.labels, to=TensorProto.FLOAT)
    # The parser reads the first `count`. A score of zero is no detection: FP16 may round small scores to zero.
    positive = back.add("Greater", selected.scores, back.constant([[0.0]], np.float32))
    count = back.add("ReduceSum", back.add("Cast", positive, to=TensorProto.FLOAT), back.constant([1]), keepdims=1)
    for tensor, name in zip((count, boxes, selected.scores, labels), OUTPUTS):
        back.add("Identity", tensor, output=name)
    shapes = ([batch, 1], [batch, selected.count, 4], [batch, selected.count], [batch, selected.count])
    value = helper.make_tensor_value_info
    return merge(
        model,
        front,
        back,
        [value("frame" if frame else "images", TensorProto.FLOAT, [batch, 3, height, width])],
        [value(name, TensorProto.FLOAT, shape) for name, shape in zip(OUTPUTS, shapes)],
        renamed={},
        metadata={},
    )


def write_deepstream(
    bundle: Bundle, folder: Path, source: str = ONNX.file, frame: tuple[int, int] | None = None
) -> DeepStreamFiles:
    """Write model.onnx, labels.txt and config_infer_primary.txt for `nvinfer config-file-path=...`.

    source   which of the bundle's graphs
    frame    height and width of nvstreammux's frames, to resize inside the graph; None leaves the resize to nvinfer
    """
    check_word(source, MODES, "source")
    frame = None if frame is None else check_size(frame, "frame")
    manifest = bundle.manifest
    model = with_parser_outputs(read_bundle_graph(bundle.require(source), ExportError), manifest, frame)
    require_no_errors(model, "the graph for DeepStream")
    if frame is None and manifest.input.resize == "letterbox":
        log.warning(
            "nvinfer pads with black where training padded with gray; --frame HxW puts the resize into the graph"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = DeepStreamFiles(folder / "config_infer_primary.txt", folder / MODEL, folder / "labels.txt")
    with atomic_write(files.model) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    write_labels(files.labels, manifest.classes)
    with atomic_write(files.config) as temporary:
        temporary.write_text(config(manifest, source, frame, batch_of(model)), encoding="utf-8")
    return files


def config(manifest: Manifest, source: str, frame: tuple[int, int] | None, batch: int | str) -> str:
    """The text of config_infer_primary.txt; paths in it are relative to it."""
    contract: InputContract = manifest.input
    height, width = frame or (contract.height, contract.width)
    letterbox = int(frame is None and contract.resize == "letterbox")
    size = batch if isinstance(batch, int) else 1
    model = one_line(manifest.model)[:80]
    return f"""# nvinfer configuration of a {model} with {len(manifest.classes)} classes, written by edgedetr.
#
# Build the engine first, on the device that runs it. The graph itself defines which parts are FP16 and INT8, and the
# builder inside nvinfer does not follow it (without a calibration table it turns INT8 into FP16):
#   /usr/src/tensorrt/bin/trtexec --onnx={MODEL} --saveEngine=model.engine --stronglyTyped
# (TensorRT 11 always is, and needs no --stronglyTyped.) An engine is executable code: run none that you did not build.

[property]
gpu-id=0
gie-unique-id=1
process-mode=1
# 0: detector
network-type=0
onnx-file={MODEL}
model-engine-file=model.engine
labelfile-path=labels.txt
batch-size={size}
# 0: float32, 1: INT8, 2: FP16; read only when nvinfer builds the engine itself
network-mode={MODES[source]}
infer-dims=3;{height};{width}
# RGB, 0..255 as it is: the normalization is inside the graph
model-color-format=0
net-scale-factor=1.0
offsets=0;0;0
maintain-aspect-ratio={letterbox}
symmetric-padding=0
# 1: bilinear
scaling-filter=1
interval=0
num-detected-classes={len(manifest.classes)}
output-blob-names={";".join(OUTPUTS)}
parse-bbox-func-name={PARSER}
custom-lib-path={LIBRARY}
# 4: no clustering; each object is found once
cluster-mode=4

[class-attrs-all]
pre-cluster-threshold={CONFIDENCE}
"""
