"""Rewrite a float graph, without changing what it computes, into a form that quantizes better.

A 1x1 convolution that reads a Concat becomes one convolution per branch and a sum. Each branch then has its own range,
and nothing is quantized behind the Concat, where OpenVINO's kernels have been seen to depart from the arithmetic of the
graph. A branch that comes from a nearest-neighbor Resize is convolved before it: the two commute, and there it has
fewer pixels.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgedetr.onnx_graph.index import GraphIndex, int_attribute


def split_concats(model: ModelProto) -> ModelProto:
    """The same function; a copy in which 1x1 convolutions read the branches of a Concat one by one."""
    graph = GraphIndex(model)
    widths = _channels(graph)
    result = ModelProto()
    result.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        concat = graph.producers.get(node.input[0]) if node.input else None
        parts = [widths.get(name) for name in concat.input] if concat is not None else []
        if concat is None or not _splittable(node, concat, graph) or None in parts:
            nodes.append(node)
            continue
        nodes.extend(_split(node, concat, [int(part) for part in parts if part is not None], graph, result))
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    needed = {item.name for item in result.graph.output}
    kept = []
    for node in reversed(copies):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
    del result.graph.node[:]
    result.graph.node.extend(kept[::-1])
    constants = [item for item in result.graph.initializer if item.name in needed]
    del result.graph.initializer[:]
    result.graph.initializer.extend(constants)
    return result


def _splittable(node: NodeProto, concat: NodeProto, graph: GraphIndex) -> bool:
    """A plain 1x1 Conv with a constant weight that reads a Concat of channels."""
    if node.op_type != "Conv" or concat.op_type != "Concat" or int_attribute(concat, "axis", 1) != 1:
        return False
    weight = graph.initializers.get(node.input[1])
    ones = all(size == 1 for item in node.attribute if item.name == "strides" for size in item.ints)
    flat = not any(size for item in node.attribute if item.name == "pads" for size in item.ints)
    return (
        weight is not None
        and list(weight.dims[2:]) == [1, 1]
        and ones
        and flat
        and int_attribute(node, "group", 1) == 1
    )


def _split(
    node: NodeProto, concat: NodeProto, widths: list[int], graph: GraphIndex, result: ModelProto
) -> list[NodeProto]:
    """One Conv per branch, the bias in the last, and their sum under the old output name."""
    weight = graph.constant(node.input[1])
    made: list[NodeProto] = []
    sums: list[str] = []
    start = 0
    for index, (branch, width) in enumerate(zip(concat.input, widths)):
        part = np.ascontiguousarray(weight[:, start : start + width])
        start += width
        name = f"{node.name}/branch.{index}"
        result.graph.initializer.append(numpy_helper.from_array(part, f"{name}.weight"))
        bias = list(node.input[2:3]) if index == len(widths) - 1 else []
        resize = graph.producers.get(branch)
        late = resize is not None and _nearest(resize) and not bias
        source = resize.input[0] if late and resize is not None else branch
        conv = NodeProto()
        conv.CopyFrom(node)
        del conv.input[:], conv.output[:]
        conv.name = name
        conv.input.extend([source, f"{name}.weight", *bias])
        conv.output.append(f"{name}_output_0")
        made.append(conv)
        if late and resize is not None:
            large = NodeProto()
            large.CopyFrom(resize)
            large.name = f"{name}/resize"
            large.input[0] = conv.output[0]
            large.output[0] = f"{name}/resize_output_0"
            made.append(large)
        sums.append(made[-1].output[0])
    total = sums[-1]
    for index, other in enumerate(sums[-2::-1]):
        output = node.output[0] if index == len(sums) - 2 else f"{node.name}/sum.{index}_output_0"
        made.append(helper.make_node("Add", [total, other], [output], f"{node.name}/sum.{index}"))
        total = output
    return made


def _nearest(node: NodeProto) -> bool:
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"nearest")
    return node.op_type == "Resize" and mode == b"nearest"


def _channels(graph: GraphIndex) -> dict[str, int]:
    """Channels of the tensors whose number follows from the convolutions before them."""
    found: dict[str, int] = {}
    for node in graph.model.graph.node:
        if node.op_type == "Conv" and node.input[1] in graph.initializers:
            found[node.output[0]] = int(graph.initializers[node.input[1]].dims[0])
        elif node.op_type in ("Relu", "Sigmoid", "Mul", "Resize", "MaxPool", "AveragePool", "Add", "Identity"):
            known = [found[name] for name in node.input if name in found]
            if known:
                found[node.output[0]] = max(known)
        elif (
            node.op_type == "Concat"
            and all(name in found for name in node.input)
            and int_attribute(node, "axis", 1) == 1
        ):
            found[node.output[0]] = sum(found[name] for name in node.input)
    return found
