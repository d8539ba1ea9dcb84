"""Validity by ONNX's own definition: names, element types, readable weights, required attributes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from onnx import NodeProto, TensorProto, ValueInfoProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.index import GraphIndex, onnx_name, type_name
from edgedetr.onnx_graph.infer import schema_of
from edgedetr.onnx_graph.io import tensor_error, tensors

CHECK = "check the file: python -m onnx.checker FILE"
AGAIN = "export the model again"
# Element types that a tensor in TensorRT can have; float64 becomes float32.
TYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT4,
    TensorProto.BOOL,
    TensorProto.FLOAT8E4M3FN,
    getattr(TensorProto, "FLOAT4E2M1", TensorProto.FLOAT8E4M3FN),
}
PACKED = {TensorProto.FLOAT8E4M3FN, TensorProto.INT4, getattr(TensorProto, "FLOAT4E2M1", TensorProto.INT4)}
# Producers of uint8 that other rules report, or that pass on the bytes of an input.
BYTES = {"QuantizeLinear", "Identity", "Flatten", "Constant"}
CLASSES = {
    "bool": "bool",
    "string": "string",
    **dict.fromkeys(("float", "float16", "bfloat16", "double"), "float"),
    **dict.fromkeys(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"), "integer"),
}


def names(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Tensors that are produced twice, never, or in a cycle; one issue for each."""
    made = Counter(name for node in graph.nodes for name in node.output if name)
    given = (
        {item.name for item in graph.model.graph.input}
        | {tensor.name for tensor in graph.model.graph.initializer}
        | {tensor.values.name for tensor in graph.model.graph.sparse_initializer}
    )
    for name in [name for name, count in made.items() if count > 1 or name in given]:
        yield LintIssue(name, "a tensor that is produced twice", AGAIN)
    for node in graph.nodes:
        for name in dict.fromkeys(node.input):
            if name and name not in made and name not in given:
                yield node_issue(node, f"reads {name!r}, which no node produces", AGAIN)
    for item in graph.model.graph.output:
        if item.name not in made and item.name not in given:
            yield LintIssue(item.name, "an output that no node produces", AGAIN)
    for node in _cycle(graph):
        yield node_issue(node, "depends on its own output", AGAIN)
        break


def _cycle(graph: GraphIndex) -> Iterator[NodeProto]:
    """Nodes that come before one they read, even in sorted order."""
    for position, node in enumerate(graph.sorted_nodes):
        if any(graph.order.get(name, -1) >= position for name in node.input):
            yield node


def element_types(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Types that TensorRT does not support, in inputs, weights, attributes and computed tensors."""
    for name, kind in graph.types.items():
        if kind not in TYPES:
            yield LintIssue(
                name,
                f"a tensor of {type_name(kind)}, a type that TensorRT does not support",
                "cast it at export, or export without it",
            )
    for item in _not_tensors([*graph.model.graph.input, *graph.model.graph.output]):
        yield LintIssue(
            item.name,
            f"a {item.type.WhichOneof('value')[:-5].replace('_', ' ')}; TensorRT supports tensors only",
            "export the model with tensors only",
        )


def _not_tensors(items: Iterable[ValueInfoProto]) -> Iterator[ValueInfoProto]:
    return (item for item in items if item.type.WhichOneof("value") not in (None, "tensor_type"))


def inner_types(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """uint8 is supported only for inputs and outputs; FP8 and INT4 are produced only by QuantizeLinear."""
    for node in graph.nodes:
        for name in node.output:
            kind = graph.types.get(name, 0)
            if kind == TensorProto.UINT8 and name not in graph.outputs and node.op_type not in BYTES:
                yield node_issue(
                    node,
                    "produces a uint8 tensor inside the graph; TensorRT supports it only for inputs and outputs",
                    "cast the input to float32 or int32",
                )
            elif kind in PACKED and node.op_type in ("Cast", "CastLike"):
                yield node_issue(
                    node, f"casts to {type_name(kind)}, which only QuantizeLinear can", "write a QuantizeLinear"
                )


def damaged_weights(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for tensor in tensors(graph.model):
        fault = "" if tensor.data_location == TensorProto.EXTERNAL else tensor_error(tensor)
        if fault:
            yield LintIssue(
                tensor.name or "(a constant without a name)", f"a weight that cannot be read: {fault}", AGAIN
            )


def by_schema(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Missing required attributes, and inputs of a wrong kind, such as floats as indices."""
    versions = {item.domain: item.version for item in graph.model.opset_import}
    classes: dict[tuple[str, str, int], dict[str, set[str]]] = {}
    for node in graph.nodes:
        schema = schema_of(node, versions)
        if schema is None:
            continue
        written = {item.name for item in node.attribute}
        for name, declared in schema.attributes.items():
            if declared.required and name not in written:
                yield node_issue(node, f"{node.op_type} has no {name}, which is required", CHECK)
        key = schema.domain, schema.name, schema.since_version
        if key not in classes:
            classes[key] = {item.type_param_str: _classes(item.allowed_type_strs) for item in schema.type_constraints}
        allowed = classes[key]
        for parameter, name in zip(schema.inputs, node.input):
            found = _classes([f"tensor({onnx_name(graph.types.get(name, 0))})"])
            wanted = allowed.get(parameter.type_str) or _classes([parameter.type_str])
            if found and wanted and not found & wanted:
                yield node_issue(
                    node,
                    f"{parameter.name} of {node.op_type} is {type_name(graph.types[name])}; ONNX allows "
                    f"{', '.join(sorted(wanted))}",
                    CHECK,
                )


def _classes(texts: Iterable[str]) -> set[str]:
    """Classes (float, integer, bool, string) of types such as `tensor(float16)`; other types have none."""
    return {CLASSES[text[7:-1]] for text in texts if text[7:-1] in CLASSES}
