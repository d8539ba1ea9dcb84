"""Control flow in a graph: what its inner graphs read from outside, and the one branch that a known condition takes."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from onnx import ModelProto, NodeProto, TensorProto, helper


def captured(node: NodeProto) -> set[str]:
    """Names that the graphs of a control-flow node read, from outside of them or from within."""
    found: set[str] = set()
    for item in node.attribute:
        for inner in [item.g] if item.HasField("g") else item.graphs:
            found.update(one.name for one in inner.output)
            for other in inner.node:
                found.update(other.input, captured(other))
    return found


def sort_nodes(model: ModelProto) -> None:
    """Put nodes behind what they read, in place and otherwise in their order: converters to float16 append casts.

    Nodes that read in a circle, or what nobody makes, stay at the end; the checker names them.
    """
    makers = {name: index for index, node in enumerate(model.graph.node) for name in node.output if name}
    nodes = list(model.graph.node)
    reads = [
        {makers[name] for name in [*node.input, *captured(node)] if name in makers} - {index}
        for index, node in enumerate(nodes)
    ]
    if all(index > max(before, default=-1) for index, before in enumerate(reads)):
        return
    readers: dict[int, list[int]] = {}
    for index, before in enumerate(reads):
        for one in before:
            readers.setdefault(one, []).append(index)
    open_reads = [len(before) for before in reads]
    ready = [index for index, count in enumerate(open_reads) if not count]
    heapify(ready)
    order = []
    while ready:
        index = heappop(ready)
        order.append(index)
        for reader in readers.get(index, []):
            open_reads[reader] -= 1
            if not open_reads[reader]:
                heappush(ready, reader)
    order += sorted({*range(len(nodes))} - {*order})
    copies = [NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def branch(model: ModelProto, node: NodeProto, condition: bool) -> list[NodeProto]:
    """The nodes of one branch of an If in its place; their constants go into the model."""
    wanted = "then_branch" if condition else "else_branch"
    graph = next(item.g for item in node.attribute if item.name == wanted)
    inside = {name: f"{node.output[0]}/{wanted}/{name}" for one in graph.node for name in one.output if name}
    inside |= {tensor.name: f"{node.output[0]}/{wanted}/{tensor.name}" for tensor in graph.initializer}
    for tensor in graph.initializer:
        copy = TensorProto.FromString(tensor.SerializeToString())
        copy.name = inside[tensor.name]
        model.graph.initializer.append(copy)
    nodes = [NodeProto.FromString(one.SerializeToString()) for one in graph.node]
    for one in nodes:
        one.name = f"{node.name}/{one.name}" if one.name else ""
        rename(one, inside)
    return nodes + [
        helper.make_node("Identity", [inside.get(item.name, item.name)], [name])
        for item, name in zip(graph.output, node.output)
    ]


def rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Other names for tensors, also where graphs of control flow read them."""
    for side in (node.input, node.output):
        side[:] = [names.get(name, name) for name in side]
    for item in node.attribute:
        for inner in [item.g] if item.HasField("g") else item.graphs:
            own = {name for one in inner.node for name in one.output} | {one.name for one in inner.initializer}
            outer = {name: new for name, new in names.items() if name not in own}
            for one in inner.node:
                rename(one, outer)
            for output in inner.output:
                output.name = outer.get(output.name, output.name)


def first_line(error: Exception) -> str:
    """What a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
