"""GraphIndex: which node produces and which nodes consume a tensor, and the tensor's type, shape and constant value."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper

from edgedetr.onnx_graph.evaluate_node import OPERATORS, evaluate
from edgedetr.onnx_graph.graph_walk import all_nodes, in_order
from edgedetr.onnx_graph.infer import Inferred, infer_types
from edgedetr.onnx_graph.io import tensor_error

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
# Operators whose output has no negative value when their first input has none.
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
_SMALL = 4096  # elements of the largest tensor that is folded
T = TypeVar("T")


@dataclass(frozen=True)
class Consumer:
    """A node that reads a tensor, and at which input."""

    node: NodeProto
    index: int


class GraphIndex:
    """An index over the main graph of a model, built once and never updated. It accepts damaged and hostile files.

    nodes, all_nodes    of the main graph; and also those inside control flow and local functions
    node_by_name        nodes of the main graph
    producers           the node that makes a tensor, by tensor
    consumers           the nodes that read a tensor, by tensor
    inputs, outputs     names of the graph's inputs and outputs
    initializers        stored tensors, by name
    constants           initializers and the values of Constant nodes, by name

    Types, shapes, values and the sorted order are computed when they are first asked for, from the model as it is then:
    ask for them before the model is edited.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        self.nodes = list(model.graph.node)
        self.node_by_name = {node.name: node for node in self.nodes}
        self.inputs = {item.name for item in model.graph.input}
        self.outputs = {item.name for item in model.graph.output}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants = dict(self.initializers)
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[Consumer]] = defaultdict(list)
        for node in self.nodes:
            if node.op_type == "Constant" and node.output:
                stored = constant_tensor(node)
                if stored is not None:
                    self.constants[node.output[0]] = stored
            self.producers.update(dict.fromkeys(node.output, node))
            for index, name in enumerate(node.input):
                if name:
                    self.consumers[name].append(Consumer(node, index))
        self._values: dict[str, np.ndarray | None] = {}
        self._cached: dict[str, Any] = {}

    @cached_property
    def all_nodes(self) -> list[NodeProto]:
        functions = (node for function in self.model.functions for node in function.node)
        return [*all_nodes(self.model.graph), *functions]

    @cached_property
    def sorted_nodes(self) -> list[NodeProto]:
        """Each node after those it reads; nodes of a cycle last."""
        return in_order(self.nodes)

    @cached_property
    def order(self) -> dict[str, int]:
        """By tensor: position of its producer in `sorted_nodes`."""
        return {name: position for position, node in enumerate(self.sorted_nodes) for name in node.output}

    @cached_property
    def _inferred(self) -> Inferred:
        return infer_types(self.model, self.sorted_nodes)

    @property
    def types(self) -> dict[str, int]:
        """Element type (TensorProto.FLOAT, ...) by tensor, where it is known.

        Inferred from inputs, weights and operators. What the file claims of its inner tensors (value_info) and of its
        outputs is ignored, because files with false claims have been seen.
        """
        return self._inferred.types

    @property
    def shapes(self) -> dict[str, list[int | None]]:
        """Sizes by tensor, None for an open dimension; absent where not even the rank is known. Inferred as `types`."""
        return self._inferred.shapes

    @property
    def inference_error(self) -> str:
        """Why types and shapes could not be inferred, or ""."""
        return self._inferred.error

    def shape(self, name: str) -> list[int | None] | None:
        """Sizes of a tensor, or None where not even its rank is known."""
        if name in self.constants:
            return list(self.constants[name].dims)
        return self.shapes.get(name)

    def constant(self, name: str) -> np.ndarray:
        """Value of a constant that is present and readable."""
        return numpy_helper.to_array(self.constants[name])

    def value(self, name: str) -> np.ndarray | None:
        """Value of a constant; None where the tensor is computed, absent, damaged, or in a file that was not read.

        The array is kept for the next call.
        """
        if name not in self._values:
            tensor = self.constants.get(name)
            readable = tensor is not None and not tensor_error(tensor)
            self._values[name] = numpy_helper.to_array(tensor) if readable and tensor is not None else None
        return self._values[name]

    def folded(self, name: str) -> np.ndarray | None:
        """As `value`, and also the value of a small tensor that is computed from constants and sizes."""
        return self.value(name) if name in self.constants else self._folded_values.get(name)

    def only_consumer(self, tensor: str) -> NodeProto | None:
        """The one node that reads `tensor`, or None when there are several or it is an output of the graph."""
        consumers = self.consumers.get(tensor, [])
        return consumers[0].node if len(consumers) == 1 and tensor not in self.outputs else None

    def after_relu(self, tensor: str) -> str:
        """Output of the Relu that is the only consumer of `tensor`, or `tensor` itself."""
        consumer = self.only_consumer(tensor)
        return consumer.output[0] if consumer is not None and consumer.op_type == "Relu" else tensor

    def never_negative(self, tensor: str) -> bool:
        """Whether the operators before `tensor` show that it cannot be negative."""
        producer = self.producers.get(tensor)
        if producer is None:
            return False
        if producer.op_type in _NEVER_NEGATIVE:
            return True
        if producer.op_type == "Concat":
            return all(self.never_negative(name) for name in producer.input)
        return producer.op_type in _KEEP_SIGN and self.never_negative(producer.input[0])

    def dequantizer(self, node: NodeProto, index: int) -> NodeProto | None:
        """The DequantizeLinear that feeds an input, directly or through a Transpose, or None."""
        if index >= len(node.input):
            return None
        producer = self.producers.get(node.input[index])
        if producer is not None and producer.op_type == "Transpose" and producer.input:
            producer = self.producers.get(producer.input[0])
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        return producer if len(producer.input) > 1 and producer.output else None

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """The result of `make`, computed at the first call with this key."""
        if key not in self._cached:
            self._cached[key] = make()
        found: T = self._cached[key]
        return found

    @cached_property
    def _folded_values(self) -> dict[str, np.ndarray]:
        known: dict[str, np.ndarray] = {}
        for node in self.sorted_nodes:
            if not node.output or not node.input or node.op_type not in OPERATORS:
                continue
            if node.op_type in ("Shape", "Size"):
                sizes = self.shape(node.input[0])
                fixed = sizes is not None and None not in sizes and math.prod(size or 0 for size in sizes) < 2**62
                values: list[np.ndarray | None] = [_of_shape(sizes)] if fixed and sizes is not None else [None]
            else:
                values = [self._small(name, known) if name else None for name in node.input]
            missing = any(name and value is None for name, value in zip(node.input, values))
            result = None if missing else evaluate(node, values)
            if result is not None and result.size <= _SMALL:
                known[node.output[0]] = result
        return known

    def _small(self, name: str, known: dict[str, np.ndarray]) -> np.ndarray | None:
        tensor = self.constants.get(name)
        if tensor is None:
            return known.get(name)
        return self.value(name) if math.prod(tensor.dims) <= _SMALL else None


def _of_shape(sizes: list[int | None]) -> np.ndarray:
    """An array of these sizes that takes no memory; only its shape is read."""
    return np.broadcast_to(np.int8(0), [size or 0 for size in sizes])


def opset_of(model: ModelProto) -> int:
    """Opset of ONNX's own operators, 0 where the file names none."""
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node, in whichever attribute it is; None for text, for sparse tensors and for nothing."""
    for item in node.attribute:
        if item.name == "value" and item.type == AttributeProto.TENSOR:
            return item.t
        written = {
            "value_float": (np.float32, item.f),
            "value_int": (np.int64, item.i),
            "value_floats": (np.float32, list(item.floats)),
            "value_ints": (np.int64, list(item.ints)),
        }.get(item.name)
        if written is not None:
            dtype, value = written
            return numpy_helper.from_array(np.array(value, dtype), next(iter(node.output), ""))
    return None


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    return next((item.i for item in node.attribute if item.name == name and item.type == AttributeProto.INT), default)


def float_attribute(node: NodeProto, name: str, default: float) -> float:
    return next((item.f for item in node.attribute if item.name == name), default)


def ints_attribute(node: NodeProto, name: str) -> list[int]:
    """A list of integers, empty where the attribute is absent."""
    return next((list(item.ints) for item in node.attribute if item.name == name), [])


def string_attribute(node: NodeProto, name: str, default: str) -> str:
    return next((item.s.decode(errors="replace") for item in node.attribute if item.name == name), default)


@cache
def onnx_name(kind: int) -> str:
    """float, double, float16, int64, ...: ONNX's own names of the element types."""
    known = kind in onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(kind).lower()) if known else f"type {kind}"


def type_name(kind: int) -> str:
    """float32, float64, float16, int64, ... for an element type."""
    name = onnx_name(kind)
    return {"float": "float32", "double": "float64"}.get(name, name)


def display_name(node: NodeProto) -> str:
    """A node's name in messages: its own, or its operator and its output."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '')}"
