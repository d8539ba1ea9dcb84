"""A graph that computes in float16 or bfloat16 becomes one of float32: what the other precisions are made from."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from edgedetr.onnx_graph.control_flow import rename
from edgedetr.onnx_graph.index import GraphIndex

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPED = {
    "Cast": "to",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "Bernoulli": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniformLike": "dtype",
    "SequenceEmpty": "dtype",
}


def widen(model: ModelProto) -> bool:
    """Make every half of the graph a float32, in place, weights at their rounded values; whether there was one."""
    found = _widen(model.graph)
    if found:
        del model.graph.value_info[:]
        drop_idle_casts(model)
    return found


def _widen(graph: GraphProto) -> bool:
    found = False
    for tensor in graph.initializer:
        found |= _widen_tensor(tensor)
    for item in [*graph.input, *graph.output, *graph.value_info]:
        kind = item.type.tensor_type
        if kind.elem_type in HALVES:
            kind.elem_type = TensorProto.FLOAT
            found = True
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                found |= _widen_tensor(item.t)
            if item.name == _TYPED.get(node.op_type) and item.i in HALVES:
                item.i, found = TensorProto.FLOAT, True
            for inner in [item.g] if item.HasField("g") else item.graphs:
                found |= _widen(inner)
    return found


def _widen_tensor(tensor: TensorProto) -> bool:
    if tensor.data_type not in HALVES:
        return False
    value = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return True


def drop_idle_casts(model: ModelProto) -> None:
    """Casts to the type that a tensor has already, as they stood between halves and floats."""
    types = GraphIndex(model).types
    outputs = {item.name for item in model.graph.output}
    alias: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        rename(node, alias)
        to = next((item.i for item in node.attribute if item.name == "to"), 0)
        if node.op_type == "Cast" and types.get(node.input[0]) == to and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
        else:
            kept.append(NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(kept)
