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
from edgedetr.errors import ExportError
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.module_paths import module_path
from edgedetr.models.selection import OtherSelections, Selection
from edgedetr.onnx_graph.bundle_graph import METADATA_PREFIX, check_graph
from edgedetr.onnx_graph.fold import fold
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.onnx_graph.opset import OPSET
from edgedetr.quantization.policy import set_role
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.backends.onnxruntime import OrtRunner

log = logging.getLogger(__name__)

# float32 through some 100 layers in another order of summation; measured on trained models: see tests/exporting.
LOGITS = 2e-3  # largest accepted difference of a logit
BOXES = 2e-4  # of a box side, as a fraction of the image (0.13 px at 640)


@dataclass(frozen=True)
class OnnxDifference:
    """Largest differences between PyTorch and ONNX Runtime over some images, query for query.

    selection   of the score of a selected cell from that of the cell of the same rank in PyTorch; 0 without a selection
    """

    logits: float
    boxes: float
    selection: float


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


def compare_with_pytorch(graph: DeployGraph, path: Path, images: np.ndarray) -> OnnxDifference:
    """Compare the file in ONNX Runtime with PyTorch. Errors: ExportError when it is not the same detector.

    Where two cells have nearly equal scores, rounding decides which of them becomes a query, or in which order. So
    PyTorch computes with the cells that the file selects, and their scores are compared with those of its own best. A
    file with an open batch size must agree on single images and on three at a time; it was traced with neither.

    images   [B, 3, H, W] float32, RGB 0..255
    """
    largest = np.zeros(3)
    for expected, actual, gap in _run_both(graph, path, images):
        difference = [np.abs(expected.logits - actual.logits).max(), np.abs(expected.boxes - actual.boxes).max(), gap]
        largest = np.maximum(largest, difference)
    logits, boxes, selection = map(float, largest)
    if not (logits <= LOGITS and boxes <= BOXES and selection <= LOGITS):  # NaN fails too
        raise ExportError(
            f"{ONNX.file} differs from PyTorch by up to {logits:.2g} in a logit, {boxes:.2g} in a box side and "
            f"{selection:.2g} in the score of a selected cell; expected at most {LOGITS:g}, {BOXES:g} and {LOGITS:g}; "
            "export with the other sampling (--sampling gather or grid_sample) and report this, it is a defect"
        )
    log.info("%s equals PyTorch to %.1e in logits and %.1e in boxes", ONNX.file, logits, boxes)
    return OnnxDifference(logits, boxes, selection)


def _run_both(graph: DeployGraph, path: Path, images: np.ndarray) -> Iterator[tuple[RawOutputs, RawOutputs, float]]:
    """Outputs of PyTorch and of the file in ONNX Runtime, batch by batch, and the gap of the selection."""
    device = next(graph.parameters()).device
    model, selected = _with_selection(read_bundle_graph(path, ExportError))
    runner = OrtRunner(model)
    size = runner.batch or 1
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    if runner.batch is None:
        batches.append(np.resize(images, (3, *images.shape[1:])))  # repeats where there are fewer
    for batch in batches:
        logits, boxes, *cells = runner.session.run(["logits", "boxes", *selected], {"images": batch})
        if len(logits) != len(batch) or len(boxes) != len(batch):
            raise ExportError(
                f"{ONNX.file} gives {len(logits)} results for {len(batch)} images; expected "
                "one each; export with one batch size and report this, it is a defect"
            )
        chosen = Selection([torch.from_numpy(indices).to(device) for indices in cells])
        try:
            with torch.no_grad(), chosen:
                expected = graph(torch.from_numpy(batch).to(device))
        except OtherSelections as error:
            raise ExportError(
                f"{ONNX.file} selects cells {len(cells)} times, and PyTorch otherwise ({error}); report this, "
                "it is a defect"
            ) from error
        yield RawOutputs(*(out.cpu().numpy() for out in expected)), RawOutputs(logits, boxes), chosen.gap


def _with_selection(model: onnx.ModelProto) -> tuple[bytes, list[str]]:
    """A serialized graph that gives the indices of each TopK as well, and their names in the order of the graph."""
    names = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in names)
    return model.SerializeToString(), names
