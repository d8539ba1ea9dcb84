"""Rewrites that make a foreign graph one of ours: fixed sizes, folded BatchNorm, our inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.importing.box_format import BoxForm
from edgedetr.importing.trace_outputs import Block
from edgedetr.onnx_graph.graph_builder import GraphBuilder
from edgedetr.onnx_graph.graph_edit import rename_tensors
from edgedetr.onnx_graph.index import GraphIndex

OURS = ("images", "logits", "boxes")  # names of a bundle's inputs and outputs


def fix_inputs(model: ModelProto, sizes: Mapping[str, Sequence[int]], constants: Mapping[str, np.ndarray]) -> None:
    """Give inputs their sizes, and replace others by constants; what was known of the inner tensors is dropped."""
    graph = model.graph
    kept = [item for item in graph.input if item.name in sizes]
    for item in kept:
        shape = item.type.tensor_type.shape
        del shape.dim[:]
        for size in sizes[item.name]:
            shape.dim.add(dim_value=size)
    copies = [onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in kept]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(copies)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    for item in graph.output:  # their sizes follow from the inputs'
        item.type.tensor_type.ClearField("shape")


def name_nodes(model: ModelProto) -> None:
    """Every node gets a name of its own: policies and profiles refer to nodes by name."""
    seen: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{number}"
        seen.add(node.name)


@dataclass(frozen=True)
class _Scaling:
    """A node that multiplies by `factor` [O] and adds `summand` [O] to what a Conv gives, channel by channel."""

    conv: NodeProto
    node: NodeProto
    factor: np.ndarray
    summand: np.ndarray


def absorb_scales(model: ModelProto) -> int:
    """Fold BatchNormalization, and factors and summands per channel, into the Conv before them; how many there were.

    Without this they would be outside the quantized weights, and between the convolution and its activation.
    """
    done = 0
    while True:
        graph = GraphIndex(model)
        found = {item.conv.name: item for node in graph.nodes if (item := _scaling(graph, node)) is not None}
        for item in found.values():
            _absorb(model, graph, item)
        if not found:
            return done
        done += len(found)


def _scaling(graph: GraphIndex, node: NodeProto) -> _Scaling | None:
    """What a node does to the Conv that it alone reads, where that is a scaling by constants."""
    if node.op_type not in ("BatchNormalization", "Mul", "Add"):
        return None
    for index in range(1 if node.op_type == "BatchNormalization" else 2):
        conv = graph.producers.get(node.input[index])
        if conv is None or conv.op_type != "Conv" or conv.output[0] in graph.outputs:
            continue
        rest = [*conv.input[1:], *node.input[:index], *node.input[index + 1 :]]
        if not all(name in graph.constants for name in rest if name) or len(graph.consumers[conv.output[0]]) > 1:
            continue
        channels = graph.constants[conv.input[1]].dims[0]
        if node.op_type == "BatchNormalization":
            gain, shift, mean, variance = (graph.constant(name).astype(np.float64) for name in node.input[1:5])
            epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
            factor = gain / np.sqrt(variance + epsilon)
            return _Scaling(conv, node, factor, shift - mean * factor)
        value = _spread(graph.constant(node.input[1 - index]).astype(np.float64), channels)
        if value is not None:
            multiplies = node.op_type == "Mul"
            return _Scaling(
                conv, node, value if multiplies else np.ones(channels), np.zeros(channels) if multiplies else value
            )
    return None


def _spread(value: np.ndarray, channels: int) -> np.ndarray | None:
    """A constant that is one number, or one per channel of a map, as [channels]; None for any other shape."""
    shape = list(value.shape)
    per_channel = len(shape) in (3, 4) and shape[-3:] == [channels, 1, 1] and (len(shape) == 3 or shape[0] == 1)
    return np.broadcast_to(value.reshape(-1), (channels,)) if value.size == 1 or per_channel else None


def _absorb(model: ModelProto, graph: GraphIndex, item: _Scaling) -> None:
    conv = item.conv
    weight = graph.constant(conv.input[1]).astype(np.float64)
    biased = len(conv.input) > 2 and bool(conv.input[2])
    bias = graph.constant(conv.input[2]).astype(np.float64) if biased else np.zeros(len(weight))
    # In float64: the fold is done once, and its rounding would stay in the weights.
    folded = {
        f"{conv.name}.weight": weight * item.factor[:, None, None, None],
        f"{conv.name}.bias": bias * item.factor + item.summand,
    }
    for old in [tensor for tensor in model.graph.initializer if tensor.name in folded]:
        model.graph.initializer.remove(old)
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in folded.items()
    )
    data = conv.input[0]
    del conv.input[:]
    conv.input.extend([data, *folded])
    conv.output[0] = item.node.output[0]
    model.graph.node.remove(item.node)


def dress(
    model: ModelProto,
    image: str,
    logits: Block,
    boxes: Block,
    form: BoxForm,
    *,
    scale: np.ndarray,
    shift: np.ndarray,
    columns: Sequence[int],
    queries: int,
    width: int,
) -> ModelProto:
    """Our contract around the graph: `images` 0..255 -> normalization -> the graph -> `logits`, `boxes`.

    form           how the graph writes boxes; ours are cx, cy, w, h in shares of the image
    scale, shift   [3]   what the graph takes is images * scale + shift, per RGB channel
    columns              places, among the `width` class logits of each of the queries, to keep in this order
    """
    result = ModelProto()
    result.CopyFrom(model)
    _rename(result, {name: f"{name}/inner" for name in OURS})
    image, logits, boxes = (
        _inner(image),
        replace(logits, tensor=_inner(logits.tensor)),
        replace(boxes, tensor=_inner(boxes.tensor)),
    )
    graph = result.graph
    size = [dim.dim_value for item in graph.input if item.name == image for dim in item.type.tensor_type.shape.dim]
    before, name = GraphBuilder("/normalize"), "images"
    for kind, value in (("Mul", scale), ("Add", shift)):
        if not np.all(value == (1 if kind == "Mul" else 0)):
            name = before.add(kind, name, before.constant(value.reshape(3, 1, 1), np.float32))
    for node in graph.node:
        rename_tensors(node, {image: name})
    classes, places = GraphBuilder("/logits"), GraphBuilder("/boxes")
    found = _rows(classes, logits, queries, width)
    if list(columns) == list(range(width)):
        classes.add("Identity", found, output="logits")
    else:
        classes.add("Gather", found, classes.constant(list(columns)), output="logits", axis=2)
    places.add("Identity", _shares(places, _rows(places, boxes, queries, 4), form), output="boxes")
    nodes = [
        NodeProto.FromString(node.SerializeToString())
        for node in [*before.nodes, *graph.node, *classes.nodes, *places.nodes]
    ]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*before.constants, *classes.constants, *places.constants])
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, size))
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, queries, last])
        for name, last in (("logits", len(columns)), ("boxes", 4))
    )
    return result


def _inner(name: str) -> str:
    return f"{name}/inner" if name in OURS else name


def _rows(part: GraphBuilder, block: Block, queries: int, width: int) -> str:
    """[1, queries, width] of the block; what is there already costs a node that folding removes."""
    name = block.tensor
    if block.turned or block.columns:
        name = part.add("Reshape", name, part.constant([1, -1, queries] if block.turned else [1, queries, -1]))
    if block.turned:
        name = part.add("Transpose", name, perm=[0, 2, 1])
    if block.columns:
        first, last = block.columns
        return part.add("Slice", name, part.constant([first]), part.constant([last]), part.constant([2]))
    return part.add("Reshape", name, part.constant([1, queries, width]))


def _shares(part: GraphBuilder, boxes: str, form: BoxForm) -> str:
    """cx, cy, w, h in shares of the image, [1, N, 4].

    Element by element: a product of matrices may be rounded to TF32.
    """
    if form.unit != (1.0, 1.0):
        boxes = part.add("Mul", boxes, part.constant(1 / np.array(form.unit * 2), np.float32))
    if form.layout == "cxcywh":
        return boxes
    first, second = part.add_many("Split", boxes, part.constant([2, 2]), outputs=("", ""), axis=2)
    size = second if form.layout == "xywh" else part.add("Sub", second, first)
    center = part.add("Add", first, part.add("Mul", size, part.constant(0.5, np.float32)))
    return part.add("Concat", center, size, axis=2)


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    for node in model.graph.node:
        rename_tensors(node, names)
    for item in [*model.graph.initializer, *model.graph.input, *model.graph.output]:
        item.name = names.get(item.name, item.name)
