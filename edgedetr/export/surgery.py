"""Rewrites that make a foreign graph one of ours: fixed sizes, folded BatchNorm, our inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.graph.view import GraphView


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
    for item in graph.output:       # their sizes follow from the inputs'
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

    Without this they would be outside the quantised weights, and between the convolution and its activation.
    """
    done = 0
    while True:
        view = GraphView(model, infer=False)
        found = {item.conv.name: item for node in view.nodes if (item := _scaling(view, node)) is not None}
        for item in found.values():
            _absorb(model, view, item)
        if not found:
            return done
        done += len(found)


def _scaling(view: GraphView, node: NodeProto) -> _Scaling | None:
    """What a node does to the Conv that it alone reads, where that is a scaling by constants."""
    if node.op_type not in ("BatchNormalization", "Mul", "Add"):
        return None
    for index in range(1 if node.op_type == "BatchNormalization" else 2):
        conv = view.makers.get(node.input[index])
        if conv is None or conv.op_type != "Conv" or conv.output[0] in view.outputs:
            continue
        rest = [*conv.input[1:], *node.input[:index], *node.input[index + 1:]]
        if not all(name in view.constants for name in rest if name) or len(view.readers[conv.output[0]]) > 1:
            continue
        channels = view.constants[conv.input[1]].dims[0]
        if node.op_type == "BatchNormalization":
            gain, shift, mean, variance = (view.constant(name).astype(np.float64) for name in node.input[1:5])
            epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
            factor = gain / np.sqrt(variance + epsilon)
            return _Scaling(conv, node, factor, shift - mean * factor)
        value = _spread(view.constant(node.input[1 - index]).astype(np.float64), channels)
        if value is not None:
            multiplies = node.op_type == "Mul"
            return _Scaling(conv, node, value if multiplies else np.ones(channels),
                            np.zeros(channels) if multiplies else value)
    return None


def _spread(value: np.ndarray, channels: int) -> np.ndarray | None:
    """A constant that is one number, or one per channel of a map, as [channels]; None for any other shape."""
    shape = list(value.shape)
    per_channel = len(shape) in (3, 4) and shape[-3:] == [channels, 1, 1] and (len(shape) == 3 or shape[0] == 1)
    return np.broadcast_to(value.reshape(-1), (channels,)) if value.size == 1 or per_channel else None


def _absorb(model: ModelProto, view: GraphView, item: _Scaling) -> None:
    conv = item.conv
    weight = view.constant(conv.input[1]).astype(np.float64)
    biased = len(conv.input) > 2 and bool(conv.input[2])
    bias = view.constant(conv.input[2]).astype(np.float64) if biased else np.zeros(len(weight))
    # In float64: the fold is done once, and its rounding would stay in the weights.
    folded = {f"{conv.name}.weight": weight * item.factor[:, None, None, None],
              f"{conv.name}.bias": bias * item.factor + item.summand}
    for old in [tensor for tensor in model.graph.initializer if tensor.name in folded]:
        model.graph.initializer.remove(old)
    model.graph.initializer.extend(numpy_helper.from_array(value.astype(np.float32), name)
                                   for name, value in folded.items())
    data = conv.input[0]
    del conv.input[:]
    conv.input.extend([data, *folded])
    conv.output[0] = item.node.output[0]
    model.graph.node.remove(item.node)


def dress(model: ModelProto, image: str, logits: str, boxes: str, *, scale: np.ndarray, shift: np.ndarray,
          columns: Sequence[int], queries: int, width: int) -> ModelProto:
    """Our contract around the graph: `images` 0..255 -> normalisation -> the graph -> `logits`, `boxes`.

    scale, shift   [3]   what the graph takes is images * scale + shift, per RGB channel
    columns              places, among the `width` class logits of each of the queries, to keep in this order
    """
    result = ModelProto()
    result.CopyFrom(model)
    _rename(result, {name: f"{name}/inner" for name in ("images", "logits", "boxes")})
    image, logits, boxes = (f"{name}/inner" if name in ("images", "logits", "boxes") else name
                            for name in (image, logits, boxes))
    graph = result.graph
    size = [dim.dim_value for item in graph.input if item.name == image for dim in item.type.tensor_type.shape.dim]
    before, name = [], "images"
    for kind, label, value in (("Mul", "scale", scale), ("Add", "shift", shift)):
        if not np.all(value == (1 if kind == "Mul" else 0)):
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32).reshape(3, 1, 1),
                                                             f"normalise.{label}"))
            before.append(helper.make_node(kind, [name, f"normalise.{label}"], [f"normalise.{label}_output"],
                                           f"/normalise/{kind}"))
            name = f"normalise.{label}_output"
    for node in graph.node:
        for index, read in enumerate(node.input):
            if read == image:
                node.input[index] = name
    after = [helper.make_node("Identity", [boxes], ["boxes"], "/boxes")]
    if list(columns) == list(range(width)):
        after.append(helper.make_node("Identity", [logits], ["logits"], "/logits"))
    else:
        graph.initializer.append(numpy_helper.from_array(np.array(columns, np.int64), "logits.columns"))
        after.append(helper.make_node("Gather", [logits, "logits.columns"], ["logits"], "/logits", axis=2))
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in [*before, *graph.node, *after]]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, size))
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, queries, last])
                        for name, last in (("logits", len(columns)), ("boxes", 4)))
    return result


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    for node in model.graph.node:
        for side in (node.input, node.output):
            for index, name in enumerate(side):
                side[index] = names.get(name, name)
    for item in [*model.graph.initializer, *model.graph.input, *model.graph.output]:
        item.name = names.get(item.name, item.name)
