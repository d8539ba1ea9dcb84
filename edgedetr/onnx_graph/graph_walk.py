"""Walk over the nodes of a graph: also inside control flow, and in the order in which they can run."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator

from onnx import GraphProto, NodeProto


def inner_graphs(node: NodeProto) -> list[GraphProto]:
    """The graphs in a node's attributes: branches of an If, the body of a Loop."""
    return [inner for item in node.attribute for inner in ([item.g] if item.HasField("g") else item.graphs)]


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, also inside control flow, at any depth."""
    waiting = [graph]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += inner_graphs(node)


def captured(node: NodeProto) -> set[str]:
    """Names that the inner graphs of a node read, from outside of them or from within."""
    found: set[str] = set()
    for inner in inner_graphs(node):
        found.update(output.name for output in inner.output)
        for other in all_nodes(inner):
            found.update(other.input)
            found.update(output.name for deeper in inner_graphs(other) for output in deeper.output)
    return found


def in_order(nodes: list[NodeProto]) -> list[NodeProto]:
    """Each node after those it reads, otherwise in the given order; nodes of a cycle last."""
    producer = {name: position for position, node in enumerate(nodes) for name in node.output if name}
    consumers: dict[int, list[int]] = defaultdict(list)
    missing = []
    for position, node in enumerate(nodes):
        before = {producer[name] for name in [*node.input, *captured(node)] if name in producer}
        missing.append(len(before))
        for other in before:
            consumers[other].append(position)
    ready = [position for position, count in enumerate(missing) if not count]
    order = []
    while ready:
        position = heapq.heappop(ready)
        order.append(position)
        for consumer in consumers[position]:
            missing[consumer] -= 1
            if not missing[consumer]:
                heapq.heappush(ready, consumer)
    done = set(order)
    return [nodes[position] for position in [*order, *(other for other in range(len(nodes)) if other not in done)]]
