"""From the kernels of a backend to groups: whose time a kernel's is.

A backend fuses, so a kernel is found by the node it is named after, or by the nodes before it up to a group: bias,
activation, residual sum, Q/DQ. A kernel that computes layers of several groups is shared by their products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.groups import Group, macs

BACK = 6  # nodes that are followed from a kernel's node back to its group: DQ, bias, activation (two for SiLU), sum, Q
PAIR = ("_QuantizeLinear", "_DequantizeLinear")  # ends of the names of Q and DQ nodes, as qdq.py names them
_BRANCH = re.compile(r"/branch\.\d+$")  # of a convolution that concat_split.py made
# Kernels of their own, whatever comes before them: also the products that are in no group.
_STOPS = ("Concat", "Split", "Gather", "Softmax", "LayerNormalization", "Conv", "ConvTranspose", "MatMul", "Gemm")


def owner_of(graph: GraphIndex, groups: Sequence[Group]) -> Callable[[str], str]:
    """A function from the name of a node or tensor to the id of the group that it belongs to; "" for none."""
    by_node = _by_node(groups)
    found: dict[str, str] = {}

    def owner(name: str) -> str:
        if name not in found:
            # A name that the graph has is no longer form of another: MatMul_1 is not MatMul with something fused to it.
            known = name in graph.node_by_name or name in graph.producers
            own = by_node.get(name, "") if known else _own_name(name, by_node)
            found[name] = own or _upstream(name, graph, by_node)
        return found[name]

    return owner


def shares_of(graph: GraphIndex, groups: Sequence[Group]) -> Callable[[Iterable[str]], dict[str, float]]:
    """A function from the names that a kernel stands for to {group id: share of its time}; empty for no group.

    Layers of groups decide, each by its multiply-accumulates; where a kernel names none, the first name with an owner.
    """
    by_node, owner = _by_node(groups), owner_of(graph, groups)
    weights: dict[str, int] = {}
    for group in groups:
        for node in group.nodes:
            for name in {node, _BRANCH.sub("", node)}:
                weights[name] = weights.get(name, 0) + macs(graph.node_by_name[node], graph)

    def shares(names: Iterable[str]) -> dict[str, float]:
        names = list(names)
        found: dict[str, float] = {}
        for name in names:
            if name in by_node:
                found[by_node[name]] = found.get(by_node[name], 0.0) + max(1, weights[name])
        total = sum(found.values())
        if found:
            return {group: weight / total for group, weight in found.items()}
        first = next(filter(None, map(owner, names)), "")
        return {first: 1.0} if first else {}

    return shares


def _by_node(groups: Sequence[Group]) -> dict[str, str]:
    """{node: group}; a convolution that was split is also known by the name that it has in an unsplit graph."""
    whole = {_BRANCH.sub("", node): group.id for group in groups for node in group.nodes}
    return {**whole, **{node: group.id for group in groups for node in group.nodes}}


def _own_name(name: str, by_node: Mapping[str, str]) -> str:
    """The group of the node that a name is, or begins with: a fused kernel adds to the name of its first node."""
    while name:
        if name in by_node:
            return by_node[name]
        cut = max(name.rfind("/"), name.rfind("."), name.rfind("_"))
        name = name[:cut] if cut > 0 else ""
    return ""


def _upstream(name: str, graph: GraphIndex, by_node: Mapping[str, str]) -> str:
    """The group before a node or tensor, at most BACK nodes away, with no other computed branch to choose from."""
    node = graph.node_by_name.get(name) or graph.producers.get(name)
    if node is None:  # a Q or DQ node: its tensor's name and a suffix
        for suffix in (*PAIR, "_quantized", "_dequantized"):
            if name.endswith(suffix):
                node = graph.producers.get(name.removesuffix(suffix))
    for _ in range(BACK):
        if node is not None and node.name in by_node:
            return by_node[node.name]
        if node is None or node.op_type in _STOPS:
            return ""
        inputs = [graph.producers[tensor] for tensor in node.input if tensor in graph.producers]
        inputs.sort(key=lambda before: graph.order.get(before.output[0], -1))
        node = inputs[-1] if inputs else None  # of a residual sum: the later branch, into whose kernel it goes
    return ""
