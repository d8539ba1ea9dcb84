"""Operators that TensorRT does not have, reads otherwise than ONNX means them, or is slow or wrong at."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from edgedetr.graph.finding import Fault, Target, at
from edgedetr.graph.view import GraphView, text

TOPK_LIMIT = 3840               # K; the builder refuses more
DATA_DEPENDENT = {"NonMaxSuppression", "NonZero", "Unique", "Compress"}
CONTROL_FLOW = {"If", "Loop", "Scan"}
INTEGER = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
SINCE = {"Attention": (10, 14)}     # operator -> first TensorRT whose parser knows it
MEANT = {"linear": "bilinear", "cubic": "bicubic"}      # names of opset 20 -> names of opset 16


def foreign_domain(view: GraphView, target: Target) -> Iterator[Fault]:
    """Operators that are not ONNX's own."""
    for node in view.everywhere:
        if node.domain in ("", "ai.onnx") or (node.domain, node.op_type) in _functions(view):
            continue
        if node.op_type.endswith("_TRT") or node.domain == "trt.plugins":
            yield at(node, f"{node.op_type} is a TensorRT plugin: the engine builds and runs only where it is loaded, "
                     "and no CPU can check it", "export the model without plugins", "warning")
        else:
            yield at(node, f"{node.op_type} of domain {node.domain!r} is unknown to TensorRT",
                     "export the model with operators of ONNX alone")


def data_dependent(view: GraphView, target: Target) -> Iterator[Fault]:
    """Outputs whose size depends on values."""
    for node in view.everywhere:
        if node.op_type in DATA_DEPENDENT:
            yield at(node, f"{node.op_type} gives as many rows as the values ask for, so buffers and CUDA graphs "
                     "cannot be fixed", "cut the graph before it (edgedetr import does), or use a fixed TopK")


def control_flow(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.everywhere:
        if node.op_type in CONTROL_FLOW:
            yield at(node, f"{node.op_type} decides at run time, so no CUDA graph can be captured",
                     "export for one fixed size, so that the decision falls at export (edgedetr import folds it)")


def integer_operators(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.everywhere:
        if node.op_type in INTEGER:
            yield at(node, f"{node.op_type} is ONNX Runtime's way to write INT8, which TensorRT does not read",
                     "quantise the float model with Q/DQ pairs: edgedetr export B --int8")


def too_new(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.everywhere:
        since = SINCE.get(node.op_type)
        if since is not None and node.domain in ("", "ai.onnx") and target.tensorrt < since:
            yield at(node, f"{node.op_type} is read from TensorRT {since[0]}.{since[1]} on",
                     "export at opset 19, where it is written as MatMul and Softmax")


def scatter_reduction(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.everywhere:
        kind = text(node, "reduction", "none")
        if node.op_type in ("ScatterND", "ScatterElements") and kind != "none":
            yield at(node, f"{node.op_type} with reduction {kind!r} is not supported",
                     "scatter without a reduction, or gather and add")


def topk_bound(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.nodes:
        if node.op_type != "TopK":
            continue
        wanted = view.value(node.input[1])
        if wanted is None:
            yield at(node, "K is computed, so the size of everything behind it is open",
                     "export for one fixed size, so that K is a constant", "warning")
        elif int(wanted.reshape(-1)[0]) > TOPK_LIMIT:
            yield at(node, f"K is {int(wanted.reshape(-1)[0])}; the builder takes at most {TOPK_LIMIT}",
                     f"keep {TOPK_LIMIT} or fewer queries")


def grid_sample_mode(view: GraphView, target: Target) -> Iterator[Fault]:
    """Opset 20 renamed the modes; parsers before TensorRT 11 take a name they do not know for "nearest"."""
    for node in _grid_samples(view):
        mode = text(node, "mode", "linear" if view.opset >= 20 else "bilinear")
        if mode in MEANT:
            yield at(node, f"mode {mode!r}, the name of opset 20, which TensorRT 10 silently takes for 'nearest'",
                     f"export at opset 19, where it is called {MEANT[mode]!r} (edgedetr import renames it)",
                     "error" if target.tensorrt < (11, 0) else "warning")


def grid_sample_rank(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in _grid_samples(view):
        shape = view.shape(node.input[0])
        if shape is not None and len(shape) != 4:
            yield at(node, f"samples a tensor of {len(shape)} dimensions; before TensorRT 11.2 only 4 can be",
                     "fold the further dimensions into the batch",
                     "error" if target.tensorrt < (11, 0) else "warning")


def grid_sample_wrong(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in _grid_samples(view):
        if target.tensorrt >= (10, 14):
            yield at(node, "engines of TensorRT 10.14 to 11.1 with GridSample have given wrong detections in silence",
                     "export with --sampling gather, or compare the engine with the graph: edgedetr verify", "warning")


def batch_norm(view: GraphView, target: Target) -> Iterator[Fault]:
    """Normalisation that is not part of the convolution's weights, so that these are quantised without it."""
    for node in view.nodes:
        maker = view.makers.get(node.input[0]) if node.input else None
        after = maker is not None and maker.op_type == "Conv"
        if node.op_type == "BatchNormalization":
            yield at(node, "BatchNormalization is left" + (" behind a Conv" if after else ""),
                     "export in evaluation mode with constant folding, before quantising (edgedetr import folds it)",
                     "warning")
        elif node.op_type == "Mul" and after and _per_channel(view, node):
            yield at(node, "a Conv is scaled by a constant per channel: a frozen BatchNorm that was not folded",
                     "fold it into the weights before quantising (edgedetr import does)", "warning")


def layer_norm(view: GraphView, target: Target) -> Iterator[Fault]:
    """x - mean, its variance, / sqrt(variance + eps), written out."""
    for node in view.nodes:
        if node.op_type != "Sqrt":
            continue
        plus = view.makers.get(node.input[0])
        variance = view.makers.get(plus.input[0]) if plus is not None and plus.op_type == "Add" else None
        divides = any(reader.node.op_type == "Div" for reader in view.readers[node.output[0]])
        if variance is not None and variance.op_type == "ReduceMean" and divides:
            yield at(node, "LayerNormalization is written out; in FP16 its square has overflowed to no detections",
                     "export at opset 17 or later, where it is one operator that keeps its sums in float32", "warning")


def _grid_samples(view: GraphView) -> Iterator[NodeProto]:
    return (node for node in view.nodes if node.op_type == "GridSample")


def _per_channel(view: GraphView, node: NodeProto) -> bool:
    """Whether the other factor of a Mul is a constant [1, C, 1, 1] or [C, 1, 1], C > 1."""
    shape = view.constants[node.input[1]].dims if node.input[1] in view.constants else []
    return len(shape) in (3, 4) and list(shape[-2:]) == [1, 1] and shape[-3] > 1 and (len(shape) == 3 or shape[0] == 1)


def _functions(view: GraphView) -> set[tuple[str, str]]:
    return {(function.domain, function.name) for function in view.model.functions}
