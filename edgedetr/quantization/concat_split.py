"""Split the 1x1 convolutions that read a Concat: one convolution per branch, and a sum.

Each branch then has its own range, and nothing is quantized behind the Concat, where OpenVINO's kernels have been seen
to diverge from the arithmetic of the graph. A branch that comes from a nearest-neighbor Resize is convolved before it:
the two commute, and there it has fewer pixels. It costs no time: D-FINE-N, whose blocks of HGNetV2 join four branches,
takes 20.7 ms split, 21.1 with one range on all branches and 26.3 with these convolutions in float in ONNX Runtime
(float32 29.3); 15.8, 15.6 and 21.0 in OpenVINO (25.9); 320 px, CPU time of one thread, in turns.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgedetr.onnx_graph.graph_edit import prune
from edgedetr.onnx_graph.index import GraphIndex, int_attribute


def split_concats(model: ModelProto) -> ModelProto:
    """A copy that computes the same, in which 1x1 convolutions read the branches of a Concat one by one.

    It comes before the plan and the calibration, since it changes which tensors exist.
    """
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
    del result.graph.node[:]
    result.graph.node.extend(copies)
    prune(result)
    return result


def _splittable(node: NodeProto, concat: NodeProto, graph: GraphIndex) -> bool:
    """A plain 1x1 Conv with a constant weight that reads a Concat of channels."""
    if node.op_type != "Conv" or concat.op_type != "Concat" or int_attribute(concat, "axis", 1) != 1:
        return False
    weight = graph.initializers.get(node.input[1])
    unstrided = all(size == 1 for item in node.attribute if item.name == "strides" for size in item.ints)
    padded = any(size for item in node.attribute if item.name == "pads" for size in item.ints)
    pointwise = weight is not None and list(weight.dims[2:]) == [1, 1]
    return pointwise and unstrided and not padded and int_attribute(node, "group", 1) == 1


def _split(
    node: NodeProto, concat: NodeProto, widths: list[int], graph: GraphIndex, result: ModelProto
) -> list[NodeProto]:
    """One Conv per branch, the bias in the last, and their sum under the old output name."""
    weight = graph.constant(node.input[1])
    made: list[NodeProto] = []
    outputs: list[str] = []
    start = 0
    for index, (branch, width) in enumerate(zip(concat.input, widths)):
        part = np.ascontiguousarray(weight[:, start : start + width])
        start += width
        name = f"{node.name}/branch.{index}"
        result.graph.initializer.append(numpy_helper.from_array(part, f"{name}.weight"))
        bias = list(node.input[2:3]) if index == len(widths) - 1 else []
        producer = graph.producers.get(branch)
        resize = producer if producer is not None and _is_nearest_resize(producer) and not bias else None
        conv = NodeProto()
        conv.CopyFrom(node)
        del conv.input[:], conv.output[:]
        conv.name = name
        conv.input.extend([branch if resize is None else resize.input[0], f"{name}.weight", *bias])
        conv.output.append(f"{name}_output_0")
        made.append(conv)
        if resize is not None:
            resized = NodeProto()
            resized.CopyFrom(resize)
            resized.name = f"{name}/resize"
            resized.input[0] = conv.output[0]
            resized.output[0] = f"{name}/resize_output_0"
            made.append(resized)
        outputs.append(made[-1].output[0])
    total = outputs[-1]
    for index, other in enumerate(outputs[-2::-1]):
        output = node.output[0] if index == len(outputs) - 2 else f"{node.name}/sum.{index}_output_0"
        made.append(helper.make_node("Add", [total, other], [output], f"{node.name}/sum.{index}"))
        total = output
    return made


def _is_nearest_resize(node: NodeProto) -> bool:
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"nearest")
    return node.op_type == "Resize" and mode == b"nearest"


def _channels(graph: GraphIndex) -> dict[str, int]:
    """Channels of the tensors whose number follows from the convolutions before them."""
    found: dict[str, int] = {}
    for node in graph.nodes:
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
