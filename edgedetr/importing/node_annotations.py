"""Which part of a foreign detector a node belongs to: its name is given our prefix, so that our policies fit it."""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from edgedetr.onnx_graph.index import GraphIndex

_BY_INDEX = ("Gather", "GatherElements", "GatherND")


def prefix_nodes(model: ModelProto, queries: int) -> dict[str, int]:
    """Put /decoder or /selector before the names of what works on queries and of what selects them; how many of each.

    decoder    its output has one row per query; where the image happens to have as many tokens, these count as well
    selector   nothing leaves it but through a TopK, or through a Gather at the places that the TopK chose
    """
    graph = GraphIndex(model)
    choosing = _choosing(graph)
    reaching = _reaching(graph, choosing)
    counts = {"decoder": 0, "selector": 0}
    for node in model.graph.node:
        role = ""
        if any(_has_rows(graph, name, queries) for name in node.output):
            role = "decoder"
        elif choosing and node.name not in reaching:
            role = "selector"
        if role:
            counts[role] += 1
            if f"/{role}/" not in node.name:
                node.name = f"/{role}/{node.name.lstrip('/')}"
    return counts


def _has_rows(graph: GraphIndex, name: str, queries: int) -> bool:
    shape = graph.shape(name)
    return shape is not None and 2 <= len(shape) <= 3 and shape[-2] == queries


def _choosing(graph: GraphIndex) -> set[str]:
    """Names of the TopK nodes, and of the Gathers that read at the places which they chose."""
    chosen: set[str] = set()
    places: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "TopK":
            chosen.add(node.name)
            places.add(node.output[1])
        elif node.op_type in _BY_INDEX and len(node.input) > 1 and node.input[1] in places:
            chosen.add(node.name)
        elif any(name in places for name in node.input):
            places.update(node.output)  # arithmetic on places: repeated, divided, with the batch before it
    return chosen


def _reaching(graph: GraphIndex, barred: set[str]) -> set[str]:
    """Names of the nodes from which an output is reached without passing a barred node."""
    reached: set[str] = set()
    waiting: list[NodeProto] = [graph.producers[name] for name in graph.outputs if name in graph.producers]
    while waiting:
        node = waiting.pop()
        if node.name in reached or node.name in barred:
            continue
        reached.add(node.name)
        waiting.extend(graph.producers[name] for name in node.input if name in graph.producers)
    return reached
