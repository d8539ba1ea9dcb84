"""A graph with everything a rule asks of it: who makes and reads a tensor, its type, its shape, its value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
_SMALL = 4096               # elements; larger weights take part in inference by their type and shape alone


@dataclass(frozen=True)
class Reader:
    """A node that reads a tensor, and at which input."""

    node: NodeProto
    index: int


class GraphView:
    """An index over a model; built once, never updated.

    types    element type (TensorProto.FLOAT, ...) by tensor, where it is known
    shapes   sizes by tensor, None for an open dimension; absent where not even the rank is known
    nodes, everywhere   of the graph itself; and also those inside control flow and local functions
    fault    why types and shapes could not be inferred, or ""
    """

    def __init__(self, model: ModelProto, *, infer: bool = True) -> None:
        """infer  False leaves types and shapes empty, which takes no time"""
        self.model, self.graph = model, model.graph
        self.opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
        self.nodes = list(model.graph.node)
        # Also those inside control flow and local functions.
        self.everywhere = [*_nodes(model.graph), *(node for function in model.functions for node in function.node)]
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[Reader]] = defaultdict(list)
        self.outputs = {item.name for item in model.graph.output}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
            self.makers.update(dict.fromkeys(node.output, node))
            for index, name in enumerate(node.input):
                if name:
                    self.readers[name].append(Reader(node, index))
        self._values: dict[str, np.ndarray | None] = {}
        self.types: dict[str, int] = {}
        self.shapes: dict[str, list[int | None]] = {}
        self.fault = self._infer() if infer else ""

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value; None for what is computed, absent, or lies in a file that was not read."""
        if name not in self._values:
            tensor = self.constants.get(name)
            readable = tensor is not None and tensor.data_location != TensorProto.EXTERNAL
            self._values[name] = numpy_helper.to_array(tensor) if readable and tensor is not None else None
        return self._values[name]

    def constant(self, name: str) -> np.ndarray:
        """Value of a constant that is there."""
        return numpy_helper.to_array(self.constants[name])

    def dequantised(self, node: NodeProto, index: int) -> NodeProto | None:
        """The DequantizeLinear that feeds an input, also through a Transpose, or None."""
        if index >= len(node.input):
            return None
        maker = self.makers.get(node.input[index])
        if maker is not None and maker.op_type == "Transpose":
            maker = self.makers.get(maker.input[0])
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    def stored(self, dequantise: NodeProto) -> str:
        """Name of the constant that a DequantizeLinear restores, integer or float behind a Q of its own; "" if none."""
        source = dequantise.input[0]
        if source in self.constants:
            return source
        maker = self.makers.get(source)
        quantised = maker is not None and maker.op_type == "QuantizeLinear"
        return maker.input[0] if quantised and maker is not None and maker.input[0] in self.constants else ""

    def shape(self, name: str) -> list[int | None] | None:
        """Sizes of a tensor, or None where not even its rank is known."""
        if name in self.constants:
            return list(self.constants[name].dims)
        return self.shapes.get(name)

    def _infer(self) -> str:
        light = ModelProto()
        light.CopyFrom(self.model)
        del light.graph.initializer[:]
        for tensor in self.model.graph.initializer:
            self.types[tensor.name] = tensor.data_type
            if int(np.prod(tensor.dims)) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
                light.graph.initializer.append(tensor)
            elif tensor.name not in {item.name for item in self.graph.input}:
                light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        try:
            inferred = shape_inference.infer_shapes(light, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, IndexError) as error:
            return (str(error).splitlines() or ["no reason given"])[0]
        graph = inferred.graph
        for item in [*graph.value_info, *graph.input, *graph.output]:
            kind = item.type.tensor_type
            if kind.elem_type:
                self.types[item.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[item.name] = [dim.dim_value if dim.HasField("dim_value") else None
                                          for dim in kind.shape.dim]
        for name, tensor in self.constants.items():
            self.types[name] = tensor.data_type
        return ""


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name), default)


def text(node: NodeProto, name: str, default: str) -> str:
    """A text attribute of a node."""
    return next((item.s.decode(errors="replace") for item in node.attribute if item.name == name), default)


def type_name(kind: int) -> str:
    """float32, float16, int64, ... for an element type."""
    known = kind in onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(kind).lower() if known else f"type {kind}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def title(node: NodeProto) -> str:
    """What a node is called in messages: its name, or what it makes."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '')}"


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for item in node.attribute:
            for inner in [item.g] if item.HasField("g") else item.graphs:
                yield from _nodes(inner)
