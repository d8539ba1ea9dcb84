"""Write the deployed graph as one float32 ONNX file, and check that the file computes the same as PyTorch.

The TorchScript exporter is used, for a fixed and for an open batch size: it names nodes by their module path, from
which their roles follow, and it takes a tenth of the time of torch.export's. Opset 19 exactly; see ExportConfig.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.overrides import TorchFunctionMode

import edgedetr
from edgedetr.artifacts import ONNX
from edgedetr.bundle import Manifest
from edgedetr.errors import ExportError
from edgedetr.evaluation.agreement import compare_detections
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.module_paths import module_path
from edgedetr.onnx_graph.bundle_graph import METADATA_PREFIX, check_graph
from edgedetr.onnx_graph.fold import fold
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.onnx_graph.opset import OPSET
from edgedetr.quantization.policy import set_role
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import Geometry

log = logging.getLogger(__name__)

# float32 through some 100 layers in another order of summation; measured on trained models: see tests/exporting.
LOGITS = 2e-3  # largest accepted difference of a logit
BOXES = 2e-4  # of a box side, as a fraction of the image (0.13 px at 640)


@dataclass(frozen=True)
class OnnxDifference:
    """Largest differences between PyTorch and ONNX Runtime over some images, query for query.

    reordered   fraction of the queries with another index (ties in top-k), 0..1
    as_objects  images that agree only as detections, because a tie at the edge of top-k selected another query
    """

    logits: float
    boxes: float
    reordered: float
    as_objects: int


def write_onnx(
    graph: DeployGraph,
    path: Path,
    *,
    batch: int | None = 1,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the graph with input `images` and outputs `logits`, `boxes`.

    batch      the one batch size that the file takes; None leaves it open
    metadata   written into the file's metadata, keys with the prefix "edgedetr."
    """
    example = torch.zeros(batch or 2, 3, graph.height, graph.width, device=next(graph.parameters()).device)
    inputs, outputs = ["images"], ["logits", "boxes"]
    open_axes = {name: {0: "batch"} for name in [*inputs, *outputs]} if batch is None else None
    graph = graph.eval()
    with warnings.catch_warnings(), torch.no_grad(), _Reshapes() if batch is None else nullcontext():
        # The tracer warns of Python numbers made from shapes (the size is fixed on purpose), the exporter of its age.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (example,),
            str(path),
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamo=False,
            dynamic_axes=open_axes,
        )
    model = fold(read_bundle_graph(path, ExportError))
    modules = {name for name, _ in graph.detector.named_modules()}
    for node in model.graph.node:
        set_role(node, graph.detector.member.role_of(module_path(node.name, modules)) or "")
    model.producer_name, model.producer_version = "edgedetr", edgedetr.__version__
    model.graph.name = "edgedetr"
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_PREFIX + key: value for key, value in (metadata or {}).items()})
    check_graph(model, opset)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


class _Reshapes(TorchFunctionMode):
    """Tensor.unflatten and Tensor.squeeze as a reshape to sizes read from the tensor.

    For unflatten, the exporter writes its example's batch size into the graph. For squeeze, where it does not know the
    sizes, it writes an If, which TensorRT treats as control flow.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.unflatten:
            tensor, dim, sizes = args
        elif func is torch.Tensor.squeeze and len(args) == 2 and args[0].shape[args[1]] == 1:
            tensor, dim, sizes = *args, ()
        else:
            return func(*args, **(kwargs or {}))
        shape = tensor.shape
        dim %= len(shape)
        return tensor.reshape(*shape[:dim], *sizes, *shape[dim + 1 :])


def compare_with_pytorch(graph: DeployGraph, path: Path, images: np.ndarray, manifest: Manifest) -> OnnxDifference:
    """Compare the file in ONNX Runtime with PyTorch. Errors: ExportError when it is not the same detector.

    Most images must agree as tensors, within LOGITS and BOXES; all of them as matched detections. A file with an open
    batch size must agree on single images and on three at a time; it was traced with neither.

    images   [B, 3, H, W] float32, RGB 0..255
    """
    largest = np.zeros(2)  # differences of logits and of boxes
    reordered, loose, count = [], [], 0
    for expected, actual in _run_both(graph, path, images):
        order = _matching_queries(expected, actual)
        logits = _largest_difference(expected.logits[0], actual.logits[0][order])
        boxes = _largest_difference(expected.boxes[0], actual.boxes[0][order])
        largest = np.maximum(largest, [logits, boxes])
        reordered.append(float((order != np.arange(len(order))).mean()))
        if not (logits <= LOGITS and boxes <= BOXES):  # NaN fails too
            loose.append((expected, actual))
        count += 1
    if 2 * len(loose) > count or not all(_same_objects(expected, actual, manifest) for expected, actual in loose):
        raise ExportError(
            f"{ONNX.file} differs from PyTorch by up to {largest[0]:.2g} in a logit and {largest[1]:.2g} "
            f"in a box side; expected at most {LOGITS:g} and {BOXES:g}; export with the other sampling "
            "(--sampling gather or grid_sample) and report this, it is a defect"
        )
    log.info("%s equals PyTorch to %.1e in logits and %.1e in boxes", ONNX.file, *largest)
    return OnnxDifference(float(largest[0]), float(largest[1]), float(np.mean(reordered)), len(loose))


def _run_both(graph: DeployGraph, path: Path, images: np.ndarray) -> Iterator[tuple[RawOutputs, RawOutputs]]:
    """Outputs of PyTorch and of the file in ONNX Runtime, image by image: logits [1, N, K], boxes [1, N, 4]."""
    device = next(graph.parameters()).device
    runner = OrtRunner(path)
    size = runner.batch or 1
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    if runner.batch is None:
        batches.append(np.resize(images, (3, *images.shape[1:])))  # repeats where there are fewer
    for batch in batches:
        actual = runner.run(batch)
        if len(actual.logits) != len(batch) or len(actual.boxes) != len(batch):
            raise ExportError(
                f"{ONNX.file} gives {len(actual.logits)} results for {len(batch)} images; expected "
                "one each; export with one batch size and report this, it is a defect"
            )
        with torch.no_grad():
            logits, boxes = (out.cpu().numpy() for out in graph(torch.from_numpy(batch).to(device)))
        for i in range(len(batch)):
            one = slice(i, i + 1)
            yield RawOutputs(logits[one], boxes[one]), RawOutputs(actual.logits[one], actual.boxes[one])


def _same_objects(expected: RawOutputs, actual: RawOutputs, manifest: Manifest) -> bool:
    """Whether every confident detection is found again at almost the same position, and none is added."""
    whole = [Geometry.of(manifest.input.height, manifest.input.width, manifest.input)]
    first, second = ({0: decode(raw, whole, manifest.classes, manifest.output)[0]} for raw in (expected, actual))
    found = compare_detections(first, second, iou=0.9)
    return found.matched in (None, 1.0) and found.spurious in (None, 0.0)


def _largest_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.abs(expected - actual).max())


def _matching_queries(expected: RawOutputs, actual: RawOutputs) -> np.ndarray:
    """[N] for each query the index of its counterpart: its own where that agrees, otherwise the nearest free one.

    Equal scores of two-stage members may be ordered either way, so a query can have another index without being wrong.
    """
    logits, boxes, other_logits, other_boxes = expected.logits[0], expected.boxes[0], actual.logits[0], actual.boxes[0]
    order = np.arange(len(logits))
    distance = np.maximum(np.abs(logits - other_logits).max(-1) / LOGITS, np.abs(boxes - other_boxes).max(-1) / BOXES)
    loose = np.flatnonzero(~(distance <= 1))
    free = list(loose)
    for query in loose:
        by_logits = np.abs(logits[query] - other_logits[free]).max(-1) / LOGITS
        by_boxes = np.abs(boxes[query] - other_boxes[free]).max(-1) / BOXES
        order[query] = free.pop(int(np.argmin(np.maximum(by_logits, by_boxes))))
    return order
