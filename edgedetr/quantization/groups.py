"""Groups: the smallest sets of nodes whose change lets a backend switch a whole kernel between float and INT8.

A convolution is a group with its activation and the residual sum that its accumulator adds; the branches of a
convolution that was split behind a Concat are one group, and so are the products of one attention. A Linear is a group
with its bias and its activation. Nodes that no fast integer kernel computes, and nodes on which coordinates depend
directly, are in no group: `groups_of` gives the groups, `floor_of` the reason for every other node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnx import NodeProto

from edgedetr.onnx_graph.hardware_limits import SMALLEST_INT8_PRODUCT
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import Policy, node_roles, weighted_nodes, why_float, why_no_kernel

Kind = Literal["convolution", "linear", "attention", "product"]

# Never INT8, whatever a search would find: the box is computed here, as a mean over bins (D-FINE, section 3.1).
FLOOR_ROLES = {"box_distribution": "distributions of a box's sides: the box itself is computed here"}
# Operators that move, scale or mask values between the two products of an attention.
_BETWEEN = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Softmax"}
_MOVING = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}
_BRANCH = re.compile(r"(.+)/branch\.\d+")  # as split_concats names the convolutions it makes


@dataclass(frozen=True)
class Group:
    """Nodes that become INT8 together.

    id        name of its first node, which export derives from module paths: the same in every export of a model
    nodes     Conv, MatMul and Gemm with a constant weight, or products of two activations (attention, product)
    kind      "product": of activations, with weights that the network predicts, as in a dynamic head
    role      what the layer is for, as its member declares it; "" for the backbone and most of the encoder
    macs      multiply-accumulates for one image
    default   whether the policy makes it INT8
    """

    id: str
    nodes: tuple[str, ...]
    kind: Kind
    role: str
    macs: int
    default: bool


def part_of(group: Group) -> str:
    """The part of the detector that a group is in, by its module path: "backbone.stages.1", "decoder.layers.0"."""
    words = [word for word in group.id.split("/") if word and word != "detector"]
    deeper = len(words) > 2 and (words[0] == "backbone" or words[1].startswith("layers."))
    return ".".join(words[:2] if deeper else words[:1])


def groups_of(graph: GraphIndex, policy: Policy) -> tuple[Group, ...]:
    """All groups in the order of the graph: those that the policy makes INT8, and those that it keeps float.

    graph   of a float model whose convolutions behind a Concat are split (concat_split.py)
    """
    return graph.cached(f"groups {policy.sha256()}", lambda: _find_groups(graph, policy))


def _find_groups(graph: GraphIndex, policy: Policy) -> tuple[Group, ...]:
    floor, roles = floor_of(graph), node_roles(graph.model)
    attention = _attention_products(graph)
    members: dict[str, list[NodeProto]] = {}
    for node in weighted_nodes(graph):
        if node.name not in floor:
            branch = _BRANCH.fullmatch(node.name)
            members.setdefault(attention.get(node.name) or (branch[1] if branch else node.name), []).append(node)
    return tuple(
        Group(
            nodes[0].name,
            tuple(node.name for node in nodes),
            _kind(nodes[0], graph, attention),
            roles.get(nodes[0].name, ""),
            sum(macs(node, graph) for node in nodes),
            all(not why_float(node, graph, policy, roles) for node in nodes),
        )
        for nodes in members.values()
    )


def floor_of(graph: GraphIndex) -> dict[str, str]:
    """{name of a convolution or product that is in no group: why it is never INT8}."""
    return dict(graph.cached("groups.floor", lambda: _find_floor(graph)))


def _find_floor(graph: GraphIndex) -> dict[str, str]:
    roles, attention = node_roles(graph.model), _attention_products(graph)
    reasons = {node.name: _why_floor(node, graph, roles) for node in weighted_nodes(graph)}
    found = {name: reason for name, reason in reasons.items() if reason}
    wide = {attention[name] for name in attention.keys() - found.keys()}
    # The products of an attention switch together; those that only weigh one row stay behind (row-column attention).
    for name, whole in attention.items():
        if whole in wide and name in found and _rows(graph.node_by_name[name], graph) != 1:
            wide.discard(whole)
    for name, whole in attention.items():
        if name not in found and whole not in wide:
            found[name] = "the other product of this attention has no fast integer kernel"
    order = {node.name: position for position, node in enumerate(graph.nodes)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _why_floor(node: NodeProto, graph: GraphIndex, roles: Mapping[str, str]) -> str:
    reason = FLOOR_ROLES.get(roles.get(node.name, ""), "")
    if reason:
        return reason
    if node.input[1] in graph.initializers:
        return why_no_kernel(node, graph)
    if node.op_type != "MatMul":
        return f"{node.op_type} of a weight that is computed"
    if node.input[0] in graph.initializers:
        return "one side of the product is a constant"
    if _rows(node, graph) == 1:
        return "weighs samples, one row per matrix: the memory is what takes time"
    sizes = _contraction(node, graph)
    if min(sizes) < SMALLEST_INT8_PRODUCT:
        return f"fewer than {SMALLEST_INT8_PRODUCT} terms or outputs: an integer product would be slower"
    return ""


def _kind(node: NodeProto, graph: GraphIndex, attention: Mapping[str, str]) -> Kind:
    if node.input[1] not in graph.initializers:
        return "attention" if node.name in attention else "product"
    return "convolution" if node.op_type == "Conv" else "linear"


# ----------------------------------------------------------------------------------------------- products of attention


def _attention_products(graph: GraphIndex) -> dict[str, str]:
    """{product of two activations around a Softmax: name of the first product of the same attention}.

    An attention whose queries or values do not depend on the image has one such product.
    """
    return graph.cached("groups.attention", lambda: _find_attention(graph))


def _find_attention(graph: GraphIndex) -> dict[str, str]:
    first: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        after = _product_after(node, graph)
        before = _product_before(node.input[0], graph, _BETWEEN | _MOVING)
        products = [product for product in (before, after) if product is not None]
        # Row-column attention reads the result of its first softmax with its second.
        inner = None if after is None else _product_before(after.input[1], graph, _MOVING)
        whole = None if inner is None else first.get(inner.name)
        for product in products:
            first[product.name] = whole or products[0].name
    return first


def _product_after(softmax: NodeProto, graph: GraphIndex) -> NodeProto | None:
    """The product that reads the Softmax as its first input, with nothing but a change of shape between them."""
    tensor = softmax.output[0]
    while True:
        node = graph.only_consumer(tensor)
        if node is None or node.op_type not in {*_MOVING, "MatMul"}:
            return None
        if node.op_type == "MatMul":
            return node if node.input[0] == tensor and node.input[1] not in graph.constants else None
        tensor = node.output[0]


def _product_before(tensor: str, graph: GraphIndex, through: set[str]) -> NodeProto | None:
    """The product of two activations that a tensor comes from, by way of these operators."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        name = waiting.pop()
        node = graph.producers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type == "MatMul":
            if not any(side in graph.constants for side in node.input):
                return node
        elif node.op_type in through:
            waiting.extend(reversed(node.input))
    return None


# --------------------------------------------------------------------------------------------------------------- sizes


def macs(node: NodeProto, graph: GraphIndex) -> int:
    """Multiply-accumulates of a convolution or product; an open dimension, which is the batch, counts as 1."""
    outputs = math.prod(size or 1 for size in graph.shape(node.output[0]) or [])
    if node.op_type == "Conv":
        return outputs * math.prod(size or 1 for size in (graph.shape(node.input[1]) or [])[1:])
    return outputs * _contraction(node, graph)[0]


def _contraction(node: NodeProto, graph: GraphIndex) -> tuple[int, int]:
    """Terms of each sum, and outputs per row, of a MatMul or Gemm; 0 where they are not known."""
    sides = (_last_two(graph.shape(node.input[1])), _last_two(graph.shape(node.input[0])))
    transposed = node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
    terms, outputs = sides[0][::-1] if transposed else sides[0]
    return terms or sides[1][1], outputs


def _rows(node: NodeProto, graph: GraphIndex) -> int:
    """Rows of each matrix on the left of a product; 0 where that is not known."""
    return _last_two(graph.shape(node.input[0]))[0]


def _last_two(shape: Sequence[int | None] | None) -> tuple[int, int]:
    if shape is None or len(shape) < 2:
        return 0, 0
    return shape[-2] or 0, shape[-1] or 0
