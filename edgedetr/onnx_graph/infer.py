"""Infer the types and shapes of a graph from its inputs, its weights and its operators.

onnx.shape_inference runs on a copy without the file's own claims about its inner tensors and outputs, which may be
wrong. Where it leaves a type open, the operator's schema names the input with the same type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, shape_inference

from edgedetr.errors import ExportError, first_line
from edgedetr.onnx_graph.graph_walk import all_nodes, in_order, inner_graphs
from edgedetr.onnx_graph.io import tensor_error

DEEPEST = 16  # graphs inside graphs; exporters write two or three
MOST_CALLS = 100_000  # nodes of a local function with those of all that it calls
_LONGEST = 2**31 - 1  # elements along one axis
_MOST_AXES = 64  # of an input whose sizes are used; TensorRT supports 8
_SMALL = 4096  # elements; larger weights take part only by type and shape
# What onnx and protobuf raise for damaged graphs.
_ERRORS = shape_inference.InferenceError, RuntimeError, ValueError, IndexError, TypeError, OverflowError, KeyError
_TENSOR = {
    f"tensor({name})": TensorProto.DataType.Value(name.upper())
    for name in ("float", "float16", "bfloat16", "double", "int64", "int32", "int8", "uint8", "bool", "string")
}


@dataclass
class Inferred:
    """Types and shapes by tensor.

    error     why there may be fewer of them than there could be, or ""
    failed    ONNX's inference gave nothing at all
    """

    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    error: str = ""
    failed: bool = False


def infer_types(model: ModelProto, nodes: list[NodeProto] | None = None, *, open_size: int | None = None) -> Inferred:
    """Types and shapes of every tensor of the main graph.

    nodes       its nodes in order, where they have been sorted already
    open_size   named dimensions of the inputs take this size; None leaves them open
    """
    nodes = in_order(list(model.graph.node)) if nodes is None else nodes
    found = Inferred(error=_too_deep(model))
    for tensor in model.graph.initializer:
        found.types[tensor.name] = tensor.data_type
    light = _without_claims(model, nodes, open_size)
    inferred: GraphProto | None = None
    if not found.error:
        inferred, found.error = _infer(light)
    found.failed = inferred is None
    _take(found, [*inferred.value_info, *inferred.input, *inferred.output] if inferred else light.graph.input)
    for node in nodes:
        if node.op_type == "Constant" and node.output:
            held = [item.t.data_type for item in node.attribute if item.HasField("t")]
            found.types.update(dict.fromkeys(node.output[:1], held[0]) if held else {})
    for tensor in model.graph.initializer:
        found.types[tensor.name] = tensor.data_type
    versions = {item.domain: item.version for item in model.opset_import}
    for node in nodes:
        _by_schema(found.types, node, versions)
    _take(found, (item for item in model.graph.input if item.name not in found.shapes))
    # An output that no node computes: only the file knows its type, and the parser believes it too.
    for item in model.graph.output:
        if item.name not in found.types and item.type.tensor_type.elem_type:
            _take(found, [item])
    return found


def checked(model: ModelProto) -> ModelProto:
    """A copy with the types and shapes of its inner tensors (value_info); ExportError where ONNX's checker refuses it.

    Strict: a shape or a type that does not fit is an error here and not on the device.
    """
    try:
        onnx.checker.check_model(model)
        return shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(
            f"the graph that was put together is not valid ONNX ({first_line(error)}); report this, it is a defect"
        ) from error


def _infer(light: ModelProto) -> tuple[GraphProto | None, str]:
    """The graph with what ONNX infers, and its complaint about sizes that do not fit."""
    try:
        return shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph, ""
    except _ERRORS as error:
        complaint = first_line(error)
    try:
        graph = shape_inference.infer_shapes(light, data_prop=True).graph
    except _ERRORS as error:
        return None, first_line(error)
    # The strict inference of onnx 1.23 fails at a Constant inside operators that ONNX itself defines as functions.
    whole = all(len(node.attribute) == 1 for node in all_nodes(light.graph) if node.op_type == "Constant")
    return graph, "" if whole and "One and only one of the attributes" in complaint else complaint


def _without_claims(model: ModelProto, nodes: list[NodeProto], open_size: int | None) -> ModelProto:
    """A copy without large weights and without the file's claims about inner tensors and outputs."""
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = "inference"
    graph.node.extend(nodes)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    graph.input.extend(model.graph.input)
    graph.output.extend(helper.make_empty_tensor_value_info(item.name) for item in model.graph.output)
    for node in all_nodes(graph):
        for inner in inner_graphs(node):
            del inner.value_info[:]
    for item in graph.input:
        if len(item.type.tensor_type.shape.dim) > _MOST_AXES:
            item.type.tensor_type.ClearField("shape")
        for size in item.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and not 0 <= size.dim_value <= _LONGEST:  # onnx 1.23 crashes on some
                size.ClearField("dim_value")
            if open_size is not None and size.HasField("dim_param"):
                size.dim_value = open_size
    inputs = {item.name for item in model.graph.input}
    for tensor in model.graph.initializer:
        if 0 <= math.prod(tensor.dims) <= _SMALL and not tensor_error(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            sizes = [size if 0 <= size <= _LONGEST else None for size in tensor.dims]
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, sizes))
    return light


def _too_deep(model: ModelProto) -> str:
    """Why ONNX's inference would crash or not end, or "": deeply nested graphs, functions that call themselves."""
    level = [model.graph, *(graph for item in model.functions for node in item.node for graph in inner_graphs(node))]
    for _ in range(DEEPEST):
        level = [inner for graph in level for node in graph.node for inner in inner_graphs(node)]
    if level:
        return f"graphs inside graphs, more than {DEEPEST} deep"
    bodies = {(item.domain, item.name): [(node.domain, node.op_type) for node in item.node] for item in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    while len(sizes) < len(bodies):
        ready = [
            name
            for name, called in bodies.items()
            if name not in sizes and all(one in sizes for one in called if one in bodies)
        ]
        if not ready:
            first = next(name for _, name in bodies if (_, name) not in sizes)
            return f"the local function {first!r} calls itself"
        for name in ready:
            sizes[name] = 1 + sum(sizes.get(one, 1) for one in bodies[name])
    if max(sizes.values(), default=0) > MOST_CALLS:
        return f"local functions that call each other more than {MOST_CALLS} times"
    return ""


def _take(found: Inferred, items: Iterable[ValueInfoProto]) -> None:
    for item in items:
        kind = item.type.tensor_type
        if kind.elem_type:
            found.types[item.name] = kind.elem_type
        if kind.HasField("shape"):
            found.shapes[item.name] = [
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in kind.shape.dim
            ]


def _by_schema(types: dict[str, int], node: NodeProto, versions: dict[str, int]) -> None:
    """Types of outputs from the operator's schema: that of an input, or the only allowed one."""
    if all(name in types for name in node.output if name):
        return
    schema = schema_of(node, versions)
    if schema is None:
        return
    known = {parameter.type_str: types[name] for parameter, name in zip(schema.inputs, node.input) if name in types}
    to = next((item.i for item in node.attribute if item.name == "to" and item.type == AttributeProto.INT), 0)
    for parameter, name in zip(schema.outputs, node.output):
        kind = known.get(parameter.type_str) or _TENSOR.get(parameter.type_str) or (to if node.op_type == "Cast" else 0)
        if name and kind:
            types.setdefault(name, kind)


def schema_of(node: NodeProto, versions: dict[str, int]) -> onnx.defs.OpSchema | None:
    """ONNX's definition of an operator at the opset of the file, None for an unknown one."""
    version = versions.get(node.domain, versions.get("ai.onnx", 0) if not node.domain else 0)
    # A file may claim any opset; beyond the newest known one, that is used.
    version = min(version, onnx.defs.onnx_opset_version()) if node.domain in ("", "ai.onnx") else version
    try:
        return onnx.defs.get_schema(node.op_type, version, "" if node.domain == "ai.onnx" else node.domain)
    except (onnx.defs.SchemaError, RuntimeError, TypeError):
        return None
