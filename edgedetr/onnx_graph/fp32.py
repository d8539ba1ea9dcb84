"""Convert a graph of float16 or bfloat16 to float32, the precision from which all others are made."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

from edgedetr.onnx_graph.graph_edit import rename_tensors, replace_nodes
from edgedetr.onnx_graph.index import GraphIndex, int_attribute

HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
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


def convert_to_fp32(model: ModelProto) -> bool:
    """Convert in place; weights keep their rounded values. Returns whether the graph had a 16-bit float."""
    found = _convert(model.graph)
    if found:
        del model.graph.value_info[:]
        remove_redundant_casts(model)
    return found


def _convert(graph: GraphProto) -> bool:
    found = False
    for tensor in graph.initializer:
        found |= _convert_tensor(tensor)
    for item in [*graph.input, *graph.output, *graph.value_info]:
        kind = item.type.tensor_type
        if kind.elem_type in HALF_TYPES:
            kind.elem_type = TensorProto.FLOAT
            found = True
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                found |= _convert_tensor(item.t)
            if item.name == _TYPED.get(node.op_type) and item.i in HALF_TYPES:
                item.i, found = TensorProto.FLOAT, True
            for inner in [item.g] if item.HasField("g") else item.graphs:
                found |= _convert(inner)
    return found


def _convert_tensor(tensor: TensorProto) -> bool:
    if tensor.data_type not in HALF_TYPES:
        return False
    value = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return True


def remove_redundant_casts(model: ModelProto) -> None:
    """Remove Casts to the type that a tensor has already, such as those between 16-bit floats and float32 before."""
    types = GraphIndex(model).types
    outputs = {item.name for item in model.graph.output}
    alias: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        rename_tensors(node, alias)
        to = int_attribute(node, "to", 0)
        if node.op_type == "Cast" and types.get(node.input[0]) == to and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    replace_nodes(model, kept)
