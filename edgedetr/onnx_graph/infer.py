"""Types and shapes of a graph from its inputs, its weights and its operators alone.

onnx.shape_inference does it on a copy from which everything is gone that the file says of its inner tensors and
outputs; where that leaves a type open, the operator's own schema says which input has the same.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, shape_inference

from edgedetr.onnx_graph.tensor_checks import tensor_fault

DEEPEST = 16  # graphs inside graphs; exporters write two or three
MOST_CALLS = 100_000  # nodes of a local function with those of all that it calls
_LONGEST = 2**31 - 1  # elements along one axis
_MOST_AXES = 64  # of an input whose sizes are followed; TensorRT has 8
_SMALL = 4096  # elements; larger weights take part by their type and shape alone
# What onnx and protobuf raise for graphs that are not one, besides InferenceError.
_FAULTS = shape_inference.InferenceError, RuntimeError, ValueError, IndexError, TypeError, OverflowError, KeyError
_TENSOR = {
    f"tensor({name})": TensorProto.DataType.Value(name.upper())
    for name in ("float", "float16", "bfloat16", "double", "int64", "int32", "int8", "uint8", "bool", "string")
}


@dataclass
class Inferred:
    """types, shapes   by tensor; `fault` says why there may be fewer than there could be."""

    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    fault: str = ""


def walk(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, also inside control flow, however deep."""
    waiting = [graph]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += inner_graphs(node)


def inner_graphs(node: NodeProto) -> list[GraphProto]:
    return [inner for item in node.attribute for inner in ([item.g] if item.HasField("g") else item.graphs)]


def in_order(nodes: list[NodeProto]) -> list[NodeProto]:
    """Each node behind those it reads, otherwise as they stand; those of a circle last."""
    maker = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    readers: dict[int, list[int]] = defaultdict(list)
    missing = []
    for place, node in enumerate(nodes):
        before = {maker[name] for name in _reads(node) if name in maker}
        missing.append(len(before))
        for other in before:
            readers[other].append(place)
    ready = [place for place, count in enumerate(missing) if not count]
    order = []
    while ready:
        place = heapq.heappop(ready)
        order.append(place)
        for reader in readers[place]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    done = set(order)
    return [nodes[place] for place in [*order, *(place for place in range(len(nodes)) if place not in done)]]


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, also from inside its graphs."""
    yield from node.input
    for graph in inner_graphs(node):
        for inner in walk(graph):
            yield from inner.input


def infer_types(model: ModelProto, nodes: list[NodeProto]) -> Inferred:
    """Types and shapes of every tensor of the main graph; `nodes` are its nodes in order."""
    found = Inferred(fault=_too_deep(model))
    for tensor in model.graph.initializer:
        found.types[tensor.name] = tensor.data_type
    if not found.fault:
        inferred, found.fault = _infer(_bare(model, nodes))
        _take(found, [*inferred.value_info, *inferred.input, *inferred.output] if inferred else model.graph.input)
    else:
        _take(found, model.graph.input)
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
    # An output that follows from nothing: the file's word is all there is, and the parser takes it too.
    for item in model.graph.output:
        if item.name not in found.types and item.type.tensor_type.elem_type:
            _take(found, [item])
    return found


def _infer(bare: ModelProto) -> tuple[GraphProto | None, str]:
    """What onnx infers, and what it says of sizes that do not fit."""
    try:
        return shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph, ""
    except _FAULTS as error:
        fault = _first_line(error)
    try:
        graph = shape_inference.infer_shapes(bare, data_prop=True).graph
    except _FAULTS as error:
        return None, _first_line(error)
    # Of an operator that ONNX itself writes as a function, the strict inference of 1.23 trips over a Constant inside.
    whole = all(len(node.attribute) == 1 for node in walk(bare.graph) if node.op_type == "Constant")
    return graph, "" if whole and "One and only one of the attributes" in fault else fault


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no reason given"])[0][:300]


def _bare(model: ModelProto, nodes: list[NodeProto]) -> ModelProto:
    """A copy in order, without large weights, and without what the file says of what it computes."""
    light = ModelProto()
    light.CopyFrom(model)
    del light.graph.initializer[:], light.graph.value_info[:], light.graph.node[:]
    light.graph.node.extend(nodes)
    for node in walk(light.graph):
        for graph in inner_graphs(node):
            del graph.value_info[:]
    for item in light.graph.output:
        item.ClearField("type")
    for item in light.graph.input:
        if len(item.type.tensor_type.shape.dim) > _MOST_AXES:
            item.type.tensor_type.ClearField("shape")
        for size in item.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and not 0 <= size.dim_value <= _LONGEST:  # onnx 1.23 crashes on some
                size.ClearField("dim_value")
    inputs = {item.name for item in model.graph.input}
    for tensor in model.graph.initializer:
        if 0 <= math.prod(tensor.dims) <= _SMALL and not tensor_fault(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            sizes = [size if 0 <= size <= _LONGEST else None for size in tensor.dims]
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, sizes))
    return light


def _too_deep(model: ModelProto) -> str:
    """What onnx would crash on or not end with: graphs in graphs in graphs, functions that call themselves."""
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
    """Types of outputs from the operator's schema: that of an input, or the only one there is."""
    if all(name in types for name in node.output if name):
        return
    schema = schema_of(node, versions)
    if schema is None:
        return
    known = {place.type_str: types[name] for place, name in zip(schema.inputs, node.input) if name in types}
    to = next((item.i for item in node.attribute if item.name == "to" and item.type == AttributeProto.INT), 0)
    for place, name in zip(schema.outputs, node.output):
        kind = known.get(place.type_str) or _TENSOR.get(place.type_str) or (to if node.op_type == "Cast" else 0)
        if name and kind:
            types.setdefault(name, kind)


def schema_of(node: NodeProto, versions: dict[str, int]) -> onnx.defs.OpSchema | None:
    """What ONNX says of an operator at the opset of the file, None for one it does not know."""
    version = versions.get(node.domain, versions.get("ai.onnx", 0) if not node.domain else 0)
    # A file may claim any number; beyond the newest, the newest is the best there is.
    version = min(version, onnx.defs.onnx_opset_version()) if node.domain in ("", "ai.onnx") else version
    try:
        return onnx.defs.get_schema(node.op_type, version, "" if node.domain == "ai.onnx" else node.domain)
    except (onnx.defs.SchemaError, RuntimeError, TypeError):
        return None
