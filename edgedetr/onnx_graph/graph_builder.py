"""Build pieces of a graph, nodes with their constants, and merge them with a graph before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.infer import checked


class GraphBuilder:
    """Nodes in the order in which they run, and their constants; the names of all of them begin with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """One node with one output, whose name is returned; "" leaves out an optional input."""
        return self.add_many(op, *inputs, outputs=(output,), **attributes)[0]

    def add_many(self, op: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        """One node with several outputs, whose names are returned; for "" a name is made up."""
        name = f"{self.prefix}/{op}_{len(self.nodes)}"
        found = [item or f"{name}_output_{number}" for number, item in enumerate(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), found, name=name, **attributes))
        return found

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """The name of a constant tensor."""
        name = f"{self.prefix}/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name


def merge(
    model: ModelProto,
    front: GraphBuilder | None,
    back: GraphBuilder,
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    renamed: Mapping[str, str],
    metadata: Mapping[str, str],
) -> ModelProto:
    """front -> the nodes of `model` -> back as one graph of the same opset.

    renamed    new names for tensors of `model`, so that an output of the result may take the old one
    metadata   key-value texts added to the file's own
    """
    merged = ModelProto()
    merged.CopyFrom(model)
    graph = merged.graph
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    middle = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend([*(front.nodes if front else []), *middle, *back.nodes])
    graph.initializer.extend([*(front.constants if front else []), *back.constants])
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    for key, value in metadata.items():
        merged.metadata_props.add(key=key, value=value)
    return checked(merged)


def output_shape(model: ModelProto, name: str) -> list[int]:
    """Dimensions of an output after the batch; ExportError where they are not fixed."""
    for item in model.graph.output:
        if item.name == name:
            dims = item.type.tensor_type.shape.dim
            if len(dims) == 3 and all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims[1:]):
                return [dim.dim_value for dim in dims[1:]]
    raise ExportError(
        f"the graph has no output {name} of a fixed shape [B, N, K]; expected what edgedetr export "
        "writes; run: edgedetr export BUNDLE"
    )


def batch_of(model: ModelProto) -> int | str:
    """The batch size of the first input: a number, or the name of an open one."""
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "batch"
