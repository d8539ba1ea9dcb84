"""Who makes and who reads every tensor of an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

# Operators whose output has no negative value when their first input has none (or, below, never has one).
_KEEP_SIGN = {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Resize",
    "Identity",
}
_NEVER_NEGATIVE = {"Relu", "Sigmoid", "Softmax"}


@dataclass(frozen=True)
class Reader:
    """A node that reads a tensor, and at which input."""

    node: NodeProto
    index: int


class Wiring:
    """An index over `model.graph`; rebuilt, never updated."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: dict[str, NodeProto] = {node.name: node for node in model.graph.node}
        self.makers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[Reader]] = defaultdict(list)
        self.outputs = {output.name for output in model.graph.output}
        for node in model.graph.node:
            for name in node.output:
                self.makers[name] = node
            for index, name in enumerate(node.input):
                if name:
                    self.readers[name].append(Reader(node, index))

    def constant(self, name: str) -> np.ndarray:
        """Value of an initializer."""
        return numpy_helper.to_array(self.constants[name])

    def only_reader(self, tensor: str) -> NodeProto | None:
        """The one node that reads `tensor`, or None when there are several or it leaves the graph."""
        readers = self.readers.get(tensor, [])
        return readers[0].node if len(readers) == 1 and tensor not in self.outputs else None

    def after_relu(self, tensor: str) -> str:
        """Output of the Relu that alone reads `tensor`, or `tensor` itself."""
        reader = self.only_reader(tensor)
        return reader.output[0] if reader is not None and reader.op_type == "Relu" else tensor

    def never_negative(self, tensor: str) -> bool:
        """Whether the operators before `tensor` show that it cannot be negative."""
        maker = self.makers.get(tensor)
        if maker is None:
            return False
        if maker.op_type in _NEVER_NEGATIVE:
            return True
        if maker.op_type == "Concat":
            return all(self.never_negative(name) for name in maker.input)
        return maker.op_type in _KEEP_SIGN and self.never_negative(maker.input[0])


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name), default)
