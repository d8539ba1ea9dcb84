"""What the table of operators says beyond a name: types, ranks, attributes, inputs and outputs."""

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
        maker = graph.producers.get(name)
        told = node.op_type == "DequantizeLinear" and maker is not None and maker.op_type == "QuantizeLinear"
        if operator.types and kind and kind not in operator.types and not told:
            yield node_issue(
                node,
                f"{node.op_type} of {kind}; the parser reads it of {', '.join(sorted(operator.types))}",
                "put a Cast to one of these before it",
                source=operator.source,
            )


def operator_limit(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Attributes, numbers of inputs and outputs, plugins: what stands at the node itself, wherever the node is."""
    for node, operator in _known(graph.all_nodes, target):
        for item in node.attribute:
            allowed = operator.attributes.get(item.name)
            wrong = [value for value in _values(item) if allowed is not None and value not in allowed]
            if wrong:
                told = " or ".join(map(str, allowed or ()))
                yield node_issue(
                    node,
                    f"{item.name} of {node.op_type} is {wrong[0]!r}; the parser takes {told}",
                    "export the model without it",
                    source=operator.source,
                )
            if item.name in operator.absent:
                # Written out although it says nothing new, it may pass.
                default = (item.type, item.s) == (AttributeProto.STRING, b"none")
                yield node_issue(
                    node,
                    f"{item.name} of {node.op_type} is not read",
                    "export the model without it",
                    "warning" if default else "error",
                    operator.source,
                )
        if operator.outputs is not None and len(node.output) > operator.outputs:
            yield node_issue(
                node,
                f"{node.op_type} with {len(node.output)} outputs; the parser takes only the first"
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
                f"{node.op_type} is read only where TensorRT's plugin {operator.plugin} is loaded, which "
                "edgedetr does not do",
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
                f"{node.op_type} of {len(shape)} dimensions; the parser takes " + ", ".join(map(str, operator.ranks)),
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
    """What each word of a node allows, and both together do not."""
    for node in graph.nodes:
        kinds = [type_name(graph.types.get(name, 0)) for name in node.input]
        if node.op_type == "Mod" and not int_attribute(node, "fmod", 0) and any("float" in kind for kind in kinds):
            yield node_issue(node, f"Mod of {kinds[0]} with fmod 0, which is for integers", "set fmod to 1")
        if node.op_type == "Attention" and len(node.input) > 2:
            shapes = [graph.shape(name) for name in node.input[1:3]]
            if int_attribute(node, "is_causal", 0) and len(node.input) > 3 and node.input[3]:
                yield node_issue(
                    node,
                    "Attention with is_causal and a mask; the parser takes one of them",
                    "put the causal mask into the mask",
                )
            if all(shapes) and None not in [*(shapes[0] or []), *(shapes[1] or [])] and shapes[0] != shapes[1]:
                yield node_issue(
                    node,
                    f"Attention of keys {shapes[0]} and values {shapes[1]}; the parser takes equal sizes",
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
    """Whether no value of an input is in it, only sizes: the parser may know more of these than is known here."""
    waiting, seen = [name], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or not name or name in graph.constants:
            continue
        seen.add(name)
        maker = graph.producers.get(name)
        if maker is None:
            return False
        if maker.op_type not in ("Shape", "Size"):
            waiting += maker.input
    return True


def _values(item: AttributeProto) -> list[object]:
    """The numbers or words of an attribute; of another kind, its kind, which is in no list."""
    if item.type in _SINGLE:
        found = [getattr(item, _SINGLE[item.type])]
    elif item.type in _LISTS:
        found = list(getattr(item, _LISTS[item.type]))
    else:
        return [f"a {AttributeProto.AttributeType.Name(item.type).lower()}"]
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in found]


def _known(nodes: list[NodeProto], target: Target) -> Iterator[tuple[NodeProto, Operator]]:
    """Nodes that the parser reads, with what it says of them; it goes by the name, whatever the domain."""
    for node in nodes:
        operator = target.table.operators.get(node.op_type)
        if operator is not None:
            yield node, operator
