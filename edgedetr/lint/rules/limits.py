"""Check nodes against the operator table: types, ranks, attributes, inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import AttributeProto, NodeProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.lint.operator_table import Operator
from edgedetr.onnx_graph.index import GraphIndex, int_attribute, type_name

MOST_DIMENSIONS = 8
_LISTS = {AttributeProto.INTS: "ints", AttributeProto.FLOATS: "floats", AttributeProto.STRINGS: "strings"}
_SINGLE = {AttributeProto.INT: "i", AttributeProto.FLOAT: "f", AttributeProto.STRING: "s"}


def operator_type(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node, operator in _known(graph.nodes, target):
        name = node.input[operator.typed] if operator.typed < len(node.input) else ""
        kind = type_name(graph.types[name]) if name in graph.types else ""
        producer = graph.producers.get(name)
        # The rules of Q/DQ pairs report a wrong type at the QuantizeLinear.
        pair = node.op_type == "DequantizeLinear" and producer is not None and producer.op_type == "QuantizeLinear"
        if operator.types and kind and kind not in operator.types and not pair:
            yield node_issue(
                node,
                f"{node.op_type} of {kind}; the parser supports {', '.join(sorted(operator.types))}",
                "put a Cast to one of these before it",
                source=operator.source,
            )


def operator_limit(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Attributes, numbers of inputs and outputs, plugins; also of nodes inside control flow and local functions."""
    for node, operator in _known(graph.all_nodes, target):
        for item in node.attribute:
            allowed = operator.attributes.get(item.name)
            wrong = [value for value in _values(item) if allowed is not None and value not in allowed]
            if wrong:
                expected = " or ".join(map(str, allowed or ()))
                yield node_issue(
                    node,
                    f"{item.name} of {node.op_type} is {wrong[0]!r}; the parser supports {expected}",
                    "export the model without it",
                    source=operator.source,
                )
            if item.name in operator.absent:
                # The default value, written out, may pass.
                default = (item.type, item.s) == (AttributeProto.STRING, b"none")
                yield node_issue(
                    node,
                    f"{item.name} of {node.op_type} is not supported",
                    "export the model without it",
                    "warning" if default else "error",
                    operator.source,
                )
        if operator.outputs is not None and len(node.output) > operator.outputs:
            yield node_issue(
                node,
                f"{node.op_type} with {len(node.output)} outputs; the parser reads only the first"
                + (f" {operator.outputs}" if operator.outputs > 1 else ""),
                "export the model without the others",
                source=operator.source,
            )
        if operator.inputs is not None and len([name for name in node.input if name]) > operator.inputs:
            yield node_issue(
                node,
                f"{node.op_type} with more than {operator.inputs} inputs",
                "export the model without the others",
                source=operator.source,
            )
        if operator.plugin:
            yield node_issue(
                node,
                f"{node.op_type} needs TensorRT's plugin {operator.plugin} to be loaded, which edgedetr does not do",
                "export the model without it, written as other operators",
                source=operator.source,
            )


def operator_input(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Ranks, fixed sizes, and inputs that must be known when the engine is built."""
    for node, operator in _known(graph.nodes, target):
        shape = graph.shape(node.input[0]) if node.input and node.input[0] else None
        if operator.ranks and shape is not None and len(shape) not in operator.ranks:
            yield node_issue(
                node,
                f"{node.op_type} of {len(shape)} dimensions; the parser supports "
                + ", ".join(map(str, operator.ranks)),
                "reshape to one of these",
                source=operator.source,
            )
        if operator.static and shape is not None and None in shape:
            yield node_issue(
                node, f"{node.op_type} of a tensor with open sizes", "export for one fixed size", source=operator.source
            )
        for index in operator.constant:
            name = node.input[index] if index < len(node.input) else ""
            known = not name or name in graph.constants or graph.folded(name) is not None
            if not known and not _follows_from_sizes(graph, name):
                yield node_issue(
                    node,
                    f"input {index} of {node.op_type} ({name}) is computed; it must be a constant",
                    "export for one fixed size, so that it is one",
                    source=operator.source,
                )


def combinations(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Combinations that the parser refuses although it supports each part."""
    for node in graph.nodes:
        kinds = [type_name(graph.types.get(name, 0)) for name in node.input]
        if node.op_type == "Mod" and not int_attribute(node, "fmod", 0) and any("float" in kind for kind in kinds):
            yield node_issue(node, f"Mod of {kinds[0]} with fmod 0, which is for integers", "set fmod to 1")
        if node.op_type == "Attention" and len(node.input) > 2:
            shapes = [graph.shape(name) for name in node.input[1:3]]
            if int_attribute(node, "is_causal", 0) and len(node.input) > 3 and node.input[3]:
                yield node_issue(
                    node,
                    "Attention with is_causal and a mask; the parser supports one of them",
                    "put the causal mask into the mask",
                )
            if all(shapes) and None not in [*(shapes[0] or []), *(shapes[1] or [])] and shapes[0] != shapes[1]:
                yield node_issue(
                    node,
                    f"Attention of keys {shapes[0]} and values {shapes[1]}; the parser supports equal sizes",
                    "write it as MatMul and Softmax",
                )


def dimensions(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for name, shape in graph.shapes.items():
        if len(shape) > MOST_DIMENSIONS:
            yield LintIssue(
                name,
                f"a tensor of {len(shape)} dimensions; TensorRT has at most {MOST_DIMENSIONS}",
                "reshape it to fewer",
            )


def _follows_from_sizes(graph: GraphIndex, name: str) -> bool:
    """Whether a tensor is computed only from sizes: the parser may know sizes that are unknown here."""
    waiting, seen = [name], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or not name or name in graph.constants:
            continue
        seen.add(name)
        producer = graph.producers.get(name)
        if producer is None:
            return False
        if producer.op_type not in ("Shape", "Size"):
            waiting += producer.input
    return True


def _values(item: AttributeProto) -> list[object]:
    """The values of an attribute; for one that is no number or string, its kind, which no list contains."""
    if item.type in _SINGLE:
        found = [getattr(item, _SINGLE[item.type])]
    elif item.type in _LISTS:
        found = list(getattr(item, _LISTS[item.type]))
    else:
        return [f"a {AttributeProto.AttributeType.Name(item.type).lower()}"]
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in found]


def _known(nodes: list[NodeProto], target: Target) -> Iterator[tuple[NodeProto, Operator]]:
    """Nodes that the parser supports, with their entry; it looks only at the name, whatever the domain."""
    for node in nodes:
        operator = target.table.operators.get(node.op_type)
        if operator is not None:
            yield node, operator
