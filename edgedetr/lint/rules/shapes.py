"""The file as a whole: its opset, its inputs, open sizes, and weights in other files."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.opset import OPSET


def opset(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """The parser also reads opsets beyond the documented ones, and interprets each operator as it knows it."""
    oldest, newest = target.table.opsets
    if not oldest <= graph.opset <= newest:
        yield LintIssue(
            "the graph",
            f"opset {graph.opset}; this parser is documented for {oldest} to {newest}",
            f"export at opset {OPSET}",
            "warning",
        )
    elif graph.opset != OPSET:
        yield LintIssue(
            "the graph",
            f"opset {graph.opset}; {OPSET} is the one that fits all needs (FP16 Q/DQ need 19, "
            "LayerNormalization 17, and 20 renames the modes of GridSample)",
            f"export at opset {OPSET}",
            "warning",
        )


def quantized_opset(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Scales per channel exist from opset 13, FP16 scales from 19; the parser accepts both in older files too."""
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 2:
            continue
        fp16 = graph.types.get(node.input[1]) == TensorProto.FLOAT16
        axis = any(item.name == "axis" for item in node.attribute)
        if (fp16 and graph.opset < 19) or (axis and graph.opset < 13):
            what = "an FP16 scale" if fp16 else "a scale per channel"
            yield node_issue(
                node,
                f"{what} at opset {graph.opset}; it exists from opset {19 if fp16 else 13}, and ONNX Runtime "
                "refuses the file",
                f"export at opset {OPSET}",
                "warning",
            )


def open_input(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Sizes of the inputs: an open batch needs a profile, an open height or width is not supported here."""
    weights = set(graph.constants)
    for item in graph.model.graph.input:
        if item.name in weights:
            continue
        shape = item.type.tensor_type.shape.dim if item.type.tensor_type.HasField("shape") else None
        if shape is None:
            yield LintIssue(item.name, "an input of unknown rank", "export with fixed sizes", "warning")
            continue
        free = [index for index, size in enumerate(shape) if not size.HasField("dim_value") or size.dim_value < 1]
        if any(index > 0 for index in free):
            yield LintIssue(
                item.name,
                "height, width or channels are open: INT8 and position embeddings need fixed sizes",
                "export for one size (edgedetr import --input HxW fixes it)",
                "warning",
            )
        elif free:
            yield LintIssue(
                item.name,
                "the batch size is open: engines for a range of batches are slower, and some were wrong at "
                "sizes within the range, without an error",
                "one engine for each batch size; compare it at full batch: edgedetr verify",
                "warning",
            )


def untyped_output(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """The parser reads the types of the outputs from the file, even where they could be inferred."""
    for item in graph.model.graph.output:
        if not item.type.tensor_type.elem_type:
            yield LintIssue(
                item.name,
                "an output without a type, at which the parser stops",
                "write the types into the file: onnx.shape_inference.infer_shapes",
            )


def shape_arithmetic(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Sizes that are computed at run time although the input is fixed; one issue for the whole graph."""
    left = [node for node in graph.nodes if node.op_type == "Shape"]
    free = any(
        not size.HasField("dim_value") for item in graph.model.graph.input for size in item.type.tensor_type.shape.dim
    )
    if left and not free:
        yield node_issue(
            left[0],
            f"{len(left)} Shape nodes are left in a graph of fixed size, each a small kernel",
            "fold constants (edgedetr export and import do)",
            "warning",
        )


def open_channels(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Channels of convolutions must be known when the engine is built."""
    inputs = {item.name for item in graph.model.graph.input}
    for node in graph.nodes:
        if node.op_type != "Conv" or not node.input:
            continue
        integer, shape = graph.dequantizer(node, 0) is not None, graph.shape(node.input[0])
        # The parser may know sizes of inner float tensors that are unknown here.
        if shape is not None and len(shape) == 4 and shape[1] is None and (integer or node.input[0] in inputs):
            yield node_issue(
                node,
                f"{'an INT8' if integer else 'a'} convolution reads a tensor whose channels are open",
                "export for one fixed size",
            )


def external_data(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Weights in other files that were not read; lint_file reports why."""
    left = [tensor.name for tensor in graph.model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if left:
        yield LintIssue(
            left[0],
            f"{len(left)} weights are outside the file and could not be read",
            "put the data file next to the model, as a plain file, and name it without a path",
        )
