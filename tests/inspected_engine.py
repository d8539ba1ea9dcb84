"""What the engine inspector and the profiler of TensorRT would say of an ONNX graph: recorded forms from a real graph.

Every convolution and product is one layer with the DQ nodes of its inputs, and with the activation, the sum and the Q
that follow it one by one, as the builder fuses them; every other node is a layer of its own. The forms are those of
TensorRT 10 and 11 (names, metadata, reformats).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from edgedetr.onnx_graph.index import GraphIndex

WEIGHTED = ("Conv", "MatMul", "Gemm")
FUSED = ("Relu", "Add", "QuantizeLinear")
WORDS = {  # precision -> datatype of a tensor as TensorRT 10 and as 11 words it
    "int8": ("Thirty-two wide channel vectorized row major Int8 format", "Int8"),
    "fp16": ("Channel major FP16 format where channel % 8 == 0", "Half"),
}


@dataclass(frozen=True)
class Reformat:
    """A layer that converts `tensor` for the layer of `node`."""

    node: str
    tensor: str
    elements: int
    source: str = "fp16"
    target: str = "int8"


def inspected(
    model: onnx.ModelProto,
    ms: Callable[[onnx.NodeProto], float],
    *,
    reformats: Sequence[tuple[Reformat, float]] = (),
    fused: bool = True,
    version: int = 10,
    metadata: bool = True,
) -> tuple[str, dict[str, float]]:
    """(the inspector's JSON, milliseconds of each layer in one run).

    ms         of the layer of a node; one without a layer of its own is not asked for
    reformats  more layers, with their milliseconds
    fused      False: activations and sums are layers of their own
    metadata   False: layers do not name the nodes that they come from
    """
    graph = GraphIndex(model)
    parts_of = {node.name: _parts(node, graph) if fused else [] for node in graph.nodes if node.op_type in WEIGHTED}
    inside = {name for parts in parts_of.values() for name in parts}
    layers, times, names = [], {}, {}
    for node in graph.nodes:
        if node.name in inside:
            continue
        parts = [node.name, *parts_of.get(node.name, ())]
        name = " + ".join(parts) if metadata else f"__myl_{node.op_type}_{len(layers)}"
        text = "\x1e".join(f"[ONNX Layer: {part}]" for part in parts) if metadata else ""
        names[node.name] = name
        times[name] = ms(node)
        layers.append(_layer(name, node.op_type, text, node.input[:1], node.output[:1], ("fp16", "fp16"), 8, version))
    for one, milliseconds in reformats:
        name = f"Reformatting CopyNode for Input Tensor 0 to {names[one.node]}"
        times[name] = milliseconds
        types = (one.source, one.target)
        layers.append(_layer(name, "Reformat", "", [one.tensor], [name], types, one.elements, version))
    return json.dumps({"Layers": layers, "Bindings" if version == 10 else "I/O Tensors": []}), times


def _parts(node: onnx.NodeProto, graph: GraphIndex) -> list[str]:
    """The DQ nodes before a layer, whose names are those of other layers' tensors, and what follows it one by one."""
    before = [graph.producers[name] for name in node.input if name in graph.producers]
    found = [one.name for one in before if one.op_type == "DequantizeLinear"]
    following = graph.only_consumer(node.output[0])
    while following is not None and following.op_type in FUSED:
        found.append(following.name)
        if following.op_type == "QuantizeLinear":
            break
        following = graph.only_consumer(following.output[0])
    return found


def _layer(
    name: str,
    kind: str,
    metadata: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: tuple[str, str],
    elements: int,
    version: int,
) -> dict[str, object]:
    def tensor(text: str, precision: str) -> dict[str, object]:
        old, new = WORDS[precision]
        about = {"Name": text, "Location": "Device", "Dimensions": [1, 4, elements // 4]}
        return {**about, "Format/Datatype": old} if version == 10 else {**about, "Format": old, "Datatype": new}

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(text, types[0]) for text in inputs],
        "Outputs": [tensor(text, types[1]) for text in outputs],
        "Metadata": metadata,
    }
