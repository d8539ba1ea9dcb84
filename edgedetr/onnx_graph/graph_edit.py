"""Edits of a graph: copy parts of it; in place replace, sort and prune nodes, rename tensors, inline an If's branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from edgedetr.onnx_graph.graph_walk import captured, in_order, inner_graphs


def copy_without(model: ModelProto, *fields: str) -> ModelProto:
    """A copy without these fields of its graph ("node", "initializer").

    A message keeps the memory of what is deleted from it for as long as it lives, so weights that a copy is not to have
    are better not copied at all.
    """
    result = ModelProto()
    _copy_fields(model, result, ("graph",))
    _copy_fields(model.graph, result.graph, fields)
    return result


def _copy_fields(source: ModelProto | GraphProto, target: ModelProto | GraphProto, left_out: Sequence[str]) -> None:
    for field, value in source.ListFields():
        if field.name in left_out:
            continue
        if field.message_type is None and isinstance(value, (str, bytes, int)):
            setattr(target, field.name, value)
        elif isinstance(value, Sequence):
            getattr(target, field.name).extend(value)
        else:
            getattr(target, field.name).CopyFrom(value)


def replace_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Make these the nodes of the graph; nodes of the graph itself may be among them."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def sort_nodes(model: ModelProto) -> None:
    """Put each node after those it reads, otherwise in their order: converters to float16 append casts at the end.

    Nodes of a cycle, or that read what no node makes, stay at the end; ONNX's checker names them.
    """
    nodes = list(model.graph.node)
    ordered = in_order(nodes)
    if any(one is not other for one, other in zip(nodes, ordered)):
        replace_nodes(model, ordered)


def prune(model: ModelProto) -> None:
    """Remove nodes and initializers that no output depends on, and all annotations of inner tensors.

    Local functions and training graphs are removed too: no graph that is written has any.
    """
    needed = {item.name for item in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input, captured(node))
    replace_nodes(model, kept[::-1])
    stored = model.graph.initializer
    for index in reversed([place for place, tensor in enumerate(stored) if tensor.name not in needed]):
        del stored[index]
    del model.graph.value_info[:], model.graph.quantization_annotation[:]
    del model.functions[:], model.training_info[:]


def rename_tensors(node: NodeProto, names: Mapping[str, str]) -> None:
    """Give the tensors of a node other names, also where its inner graphs read them."""
    for side in (node.input, node.output):
        side[:] = [names.get(name, name) for name in side]
    for inner in inner_graphs(node):
        own = {name for one in inner.node for name in one.output} | {one.name for one in inner.initializer}
        outer = {name: new for name, new in names.items() if name not in own}
        for one in inner.node:
            rename_tensors(one, outer)
        for output in inner.output:
            output.name = outer.get(output.name, output.name)


def inline_branch(model: ModelProto, node: NodeProto, condition: bool) -> list[NodeProto]:
    """The nodes of one branch of an If, to replace it; the branch's initializers are added to the model."""
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
        rename_tensors(one, inside)
    return nodes + [
        helper.make_node("Identity", [inside.get(item.name, item.name)], [name])
        for item, name in zip(graph.output, node.output)
    ]
