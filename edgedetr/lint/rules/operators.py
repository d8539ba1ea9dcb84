"""Operators that TensorRT does not support, interprets differently from ONNX, or runs slowly or wrongly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.lint.operator_table import supported_since
from edgedetr.onnx_graph.graph_walk import inner_graphs
from edgedetr.onnx_graph.hardware_limits import LARGEST_TOP_K
from edgedetr.onnx_graph.index import GraphIndex, int_attribute, string_attribute

DATA_DEPENDENT = {"NonMaxSuppression", "NonZero", "Unique", "Compress"}
CONTROL_FLOW = {"If", "Loop", "Scan"}
INTEGER = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
OPSET_16_MODES = {"linear": "bilinear", "cubic": "bicubic"}  # names of opset 20 -> names of opset 16
OWN = ("", "ai.onnx")


def foreign_domain(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Operators that are not ONNX's own."""
    for node in graph.all_nodes:
        if node.domain in OWN or (node.domain, node.op_type) in _functions(graph):
            continue
        if node.op_type.endswith("_TRT") or node.domain == "trt.plugins":
            yield node_issue(
                node,
                f"{node.op_type} is a TensorRT plugin: the engine builds and runs only where it is loaded, "
                "which edgedetr does not do, and no CPU can check it",
                "export the model without plugins",
            )
        elif node.op_type in target.table.operators:
            yield node_issue(
                node,
                f"{node.op_type} of domain {node.domain!r}: the parser looks only at the name and takes it "
                "for ONNX's own",
                "export the model with ONNX's own operators",
                "warning",
            )
        else:
            yield node_issue(
                node,
                f"{node.op_type} of domain {node.domain!r} is unknown to TensorRT",
                "export the model with ONNX's own operators",
            )


def unknown_operator(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Operators that no known parser supports, and names that ONNX does not have."""
    for node in graph.all_nodes:
        elsewhere = node.op_type in INTEGER or node.op_type in DATA_DEPENDENT
        if (
            node.domain in OWN
            and not elsewhere
            and node.op_type not in target.table.operators
            and (node.domain, node.op_type) not in _functions(graph)
            and not _later(node, target)
        ):
            yield node_issue(
                node,
                f"{node.op_type} is not among the operators that the parser supports",
                "export the model with supported operators in its place",
                source=target.table.source,
            )


def data_dependent(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Outputs whose size depends on values."""
    for node in graph.all_nodes:
        if node.op_type in DATA_DEPENDENT:
            yield node_issue(
                node,
                f"the size of {node.op_type}'s output depends on values, so buffers and CUDA graphs cannot be fixed",
                "cut the graph before it (edgedetr import does), or use a fixed TopK",
            )


def control_flow(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.all_nodes:
        if node.op_type not in CONTROL_FLOW:
            continue
        yield node_issue(
            node,
            f"{node.op_type} decides at run time, so no CUDA graph can be captured",
            "export for one fixed size, so that the branch is chosen at export (edgedetr import folds it)",
            "warning",
        )
        branches = inner_graphs(node) if node.op_type == "If" else []
        for outputs in zip(*(inner.output for inner in branches)):
            kinds = [item.type.tensor_type for item in outputs]
            ranks = {len(kind.shape.dim) for kind in kinds if kind.HasField("shape")}
            if len(ranks) > 1 or len({kind.elem_type for kind in kinds if kind.elem_type}) > 1:
                yield node_issue(
                    node,
                    "its branches give tensors of different ranks or types",
                    "export for one fixed size, so that the branch is chosen at export",
                )


def integer_operators(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.all_nodes:
        if node.op_type in INTEGER:
            yield node_issue(
                node,
                f"{node.op_type} is an INT8 operator that TensorRT does not support",
                "quantize the float model with Q/DQ pairs: edgedetr export B --int8",
            )


def too_new(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.all_nodes:
        later = _later(node, target)
        if later:
            yield node_issue(
                node,
                f"{node.op_type} is supported from TensorRT {later} on",
                "export at opset 19, where it is written as other operators",
            )


def topk_bound(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """K as a constant, or as computed from fixed sizes: sorting a whole axis is a TopK of its length."""
    for node in graph.nodes:
        if node.op_type != "TopK":
            continue
        if len(node.input) < 2:  # opset 9 has it as an attribute
            found = np.array([int_attribute(node, "k", 0)])
        else:
            folded = graph.folded(node.input[1])
            found = np.array([]) if folded is None or folded.dtype.kind not in "iu" else folded.reshape(-1)
        if not found.size:
            yield node_issue(
                node,
                "K is computed, so the sizes of all tensors after it are open",
                "export for one fixed size, so that K is a constant",
                "warning",
            )
        elif int(found[0]) < 0:
            yield node_issue(node, f"K is {int(found[0])}", "export the model again")
        elif int(found[0]) > LARGEST_TOP_K:
            yield node_issue(
                node,
                f"K is {int(found[0])}; the builder takes at most {LARGEST_TOP_K}",
                f"keep {LARGEST_TOP_K} or fewer queries",
            )


def grid_sample_mode(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Opset 20 renamed the modes; parsers before TensorRT 11 read an unknown name as "nearest"."""
    for node in _grid_samples(graph):
        mode = string_attribute(node, "mode", "linear" if graph.opset >= 20 else "bilinear")
        if mode in OPSET_16_MODES:
            yield node_issue(
                node,
                f"mode {mode!r}, the name of opset 20, which TensorRT 10 silently reads as 'nearest'",
                f"export at opset 19, where it is called {OPSET_16_MODES[mode]!r} (edgedetr import renames it)",
                "error" if target.tensorrt < (11, 0) else "warning",
            )


def grid_sample_rank(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in _grid_samples(graph):
        shape = graph.shape(node.input[0]) if node.input else None
        if shape is not None and len(shape) != 4:
            yield node_issue(
                node,
                f"samples a tensor of {len(shape)} dimensions; before TensorRT 11.2 only 4 are supported",
                "fold the further dimensions into the batch",
                "error" if target.tensorrt < (11, 0) else "warning",
            )


def grid_sample_wrong(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in _grid_samples(graph):
        if target.tensorrt >= (10, 14):
            yield node_issue(
                node,
                "engines of TensorRT 10.14 to 11.1 with GridSample have given wrong detections without an error",
                "export with --sampling gather, or compare the engine with the graph: edgedetr verify",
                "warning",
            )


def batch_norm(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Normalization that was not folded into the convolution's weights before they are quantized."""
    for node in graph.nodes:
        producer = graph.producers.get(node.input[0]) if node.input else None
        after = producer is not None and producer.op_type == "Conv"
        if node.op_type == "BatchNormalization":
            yield node_issue(
                node,
                "BatchNormalization is left" + (" after a Conv" if after else ""),
                "export in evaluation mode with constant folding, before quantizing (edgedetr import folds it)",
                "warning",
            )
        elif node.op_type == "Mul" and len(node.input) > 1 and after and _per_channel(graph, node):
            yield node_issue(
                node,
                "a Conv is scaled by a constant per channel: a frozen BatchNorm that was not folded",
                "fold it into the weights before quantizing (edgedetr import does)",
                "warning",
            )


def _grid_samples(graph: GraphIndex) -> Iterator[NodeProto]:
    return (node for node in graph.nodes if node.op_type == "GridSample")


def _per_channel(graph: GraphIndex, node: NodeProto) -> bool:
    """Whether the other factor of a Mul is a constant [1, C, 1, 1] or [C, 1, 1], C > 1."""
    shape = graph.constants[node.input[1]].dims if node.input[1] in graph.constants else []
    return len(shape) in (3, 4) and list(shape[-2:]) == [1, 1] and shape[-3] > 1 and (len(shape) == 3 or shape[0] == 1)


def _functions(graph: GraphIndex) -> set[tuple[str, str]]:
    return graph.cached("functions", lambda: {(item.domain, item.name) for item in graph.model.functions})


def _later(node: NodeProto, target: Target) -> str:
    """The later release that supports an operator which the target does not, or an empty string."""
    unsupported = node.domain in OWN and node.op_type not in target.table.operators and not target.rtx
    return supported_since(node.op_type) if unsupported else ""
