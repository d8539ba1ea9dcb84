"""model.onnx: the deployed graph as one float32 ONNX file, and the proof that it computes the same.

The TorchScript exporter is used, for one batch size and for an open one: it names nodes by their module path, which
policies and profiles refer to, and takes a tenth of the time of torch.export's. Opset 19 exactly; see ExportConfig.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
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
from edgedetr.onnx_graph.bundle_graph import METADATA_PREFIX, check_graph
from edgedetr.onnx_graph.fold import fold
from edgedetr.onnx_graph.opset import OPSET
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.backends.onnx_bytes import load
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import Geometry

log = logging.getLogger(__name__)


# float32 through some 100 layers in another order of summation; measured on trained models: see tests/export.
LOGITS = 2e-3  # largest accepted difference of a logit
BOXES = 2e-4  # of a box side, share of the image (0.13 px at 640)


@dataclass(frozen=True)
class OnnxDifference:
    """Largest differences between PyTorch and ONNX Runtime over some images, query for query.

    reordered   share of the queries that stand at another place of the list (ties in top-k), 0..1
    as_objects  images that agree only as detections: a tie at the edge of top-k let another query in
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

    batch      the one batch size the file takes; None leaves it open
    metadata   goes into the file as key-value text, under `edgedetr.`
    """
    example = torch.zeros(batch or 2, 3, graph.height, graph.width, device=next(graph.parameters()).device)
    inputs, outputs = ["images"], ["logits", "boxes"]
    open_axes = {name: {0: "batch"} for name in [*inputs, *outputs]} if batch is None else None
    graph = graph.eval()
    with warnings.catch_warnings(), torch.no_grad(), _Reshapes() if batch is None else nullcontext():
        # The tracer warns of Python numbers made from shapes: the size is fixed on purpose. The exporter of its age.
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
    model = load(path, ExportError)
    model = fold(model)
    model.producer_name, model.producer_version = "edgedetr", edgedetr.__version__
    model.graph.name = "edgedetr"
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_PREFIX + key: value for key, value in (metadata or {}).items()})
    check_graph(model, opset)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


class _Reshapes(TorchFunctionMode):
    """Tensor.unflatten and Tensor.squeeze as a reshape to sizes read from the tensor.

    What the exporter writes for unflatten has its example's batch size, and so has all that is computed behind; for
    squeeze, where it does not know the sizes, it writes an If, which TensorRT takes for control flow.
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
    """Compare the file in ONNX Runtime with PyTorch; ExportError when it is not the same detector.

    Most images must agree as tensors, within LOGITS and BOXES; all of them as matched detections. A file of an open
    batch size must do so one by one and three at a time, neither of which it was traced with.
    images   [B, 3, H, W] float32, RGB 0..255
    """
    device = next(graph.parameters()).device
    runner = OrtRunner(path)
    expected, actual = [], []
    size = runner.batch or 1
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    if runner.batch is None:
        batches.append(np.resize(images, (3, *images.shape[1:])))  # repeats where there are fewer
    with torch.no_grad():
        for batch in batches:
            found = runner.run(batch)
            if len(found.logits) != len(batch) or len(found.boxes) != len(batch):
                raise ExportError(
                    f"{ONNX.file} gives {len(found.logits)} results for {len(batch)} images; expected "
                    "one each; export with one batch size and report this, it is a defect"
                )
            logits, boxes = (out.cpu().numpy() for out in graph(torch.from_numpy(batch).to(device)))
            expected += [RawOutputs(logits[i : i + 1], boxes[i : i + 1]) for i in range(len(batch))]
            actual += [RawOutputs(found.logits[i : i + 1], found.boxes[i : i + 1]) for i in range(len(batch))]
    worst, moved, loose = [], [], []
    for one, other in zip(expected, actual):
        order = _match(one, other)
        differences = _worst(one.logits[0], other.logits[0][order]), _worst(one.boxes[0], other.boxes[0][order])
        worst.append(differences)
        moved.append(float((order != np.arange(len(order))).mean()))
        if not (differences[0] <= LOGITS and differences[1] <= BOXES):  # NaN fails too
            loose.append((one, other))
    largest = np.array(worst).max(axis=0)
    if 2 * len(loose) > len(expected) or not all(_same_objects(one, other, manifest) for one, other in loose):
        raise ExportError(
            f"{ONNX.file} differs from PyTorch by up to {largest[0]:.2g} in a logit and {largest[1]:.2g} "
            f"in a box side; expected at most {LOGITS:g} and {BOXES:g}; export with the other sampling "
            "(--sampling gather or grid_sample) and report this, it is a defect"
        )
    log.info("%s equals PyTorch to %.1e in logits and %.1e in boxes", ONNX.file, *largest)
    return OnnxDifference(float(largest[0]), float(largest[1]), float(np.mean(moved)), len(loose))


def _same_objects(one: RawOutputs, other: RawOutputs, manifest: Manifest) -> bool:
    """Whether every confident detection of one is in the other at almost the same place, and none is added."""
    whole = [Geometry.of(manifest.input.height, manifest.input.width, manifest.input)]
    first, second = ({0: decode(raw, whole, manifest.classes, manifest.output)[0]} for raw in (one, other))
    found = compare_detections(first, second, iou=0.9)
    return found.matched in (None, 1.0) and found.spurious in (None, 0.0)


def _worst(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.abs(expected - actual).max())


def _match(one: RawOutputs, other: RawOutputs) -> np.ndarray:
    """For each query [N] the place of its counterpart: its own where that agrees, otherwise the nearest free one.

    Equal scores of two-stage members may be ordered either way, so a query can stand elsewhere without being wrong.
    """
    logits, boxes, other_logits, other_boxes = one.logits[0], one.boxes[0], other.logits[0], other.boxes[0]
    order = np.arange(len(logits))
    distance = np.maximum(np.abs(logits - other_logits).max(-1) / LOGITS, np.abs(boxes - other_boxes).max(-1) / BOXES)
    loose = np.flatnonzero(~(distance <= 1))
    free = list(loose)
    for query in loose:
        far = np.abs(logits[query] - other_logits[free]).max(-1) / LOGITS
        apart = np.abs(boxes[query] - other_boxes[free]).max(-1) / BOXES
        order[query] = free.pop(int(np.argmin(np.maximum(far, apart))))
    return order
