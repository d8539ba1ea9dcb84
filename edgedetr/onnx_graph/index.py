"""A graph with everything a rule asks of it: who makes and reads a tensor, its type, its shape, its value."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.evaluate_node import OPERATORS, evaluate
from edgedetr.onnx_graph.infer import in_order, infer_types, walk
from edgedetr.onnx_graph.tensor_checks import tensor_fault

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
_SMALL = 4096  # elements of what is folded
T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """A node that reads a tensor, and at which input."""

    node: NodeProto
    index: int


class GraphView:
    """An index over a model; built once, never updated. Nothing in a file that anybody wrote makes it fail.

    types    element type (TensorProto.FLOAT, ...) by tensor, where it is known
    shapes   sizes by tensor, None for an open dimension; absent where not even the rank is known
    nodes, everywhere   of the graph itself; and also those inside control flow and local functions
    order    place of the node that makes a tensor when each node stands behind those it reads
    fault    why types and shapes could not be inferred, or ""

    Types and shapes are inferred from the inputs, the weights and the operators; what a file says of its inner tensors
    (value_info) and of its outputs is not asked, because it has been seen to be wrong.
    """

    def __init__(self, model: ModelProto, *, infer: bool = True) -> None:
        """infer  False leaves types and shapes empty, which takes no time"""
        self.model, self.graph = model, model.graph
        self.opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
        self.nodes = list(model.graph.node)
        # Also those inside control flow and local functions.
        self.everywhere = [*walk(model.graph), *(node for function in model.functions for node in function.node)]
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[Reader]] = defaultdict(list)
        self.outputs = {item.name for item in model.graph.output}
        for node in self.nodes:
            if node.op_type == "Constant" and node.output:
                stored = _constant(node)
                if stored is not None:
                    self.constants[node.output[0]] = stored
            self.makers.update(dict.fromkeys(node.output, node))
            for index, name in enumerate(node.input):
                if name:
                    self.readers[name].append(Reader(node, index))
        self._values: dict[str, np.ndarray | None] = {}
        self._computed: dict[str, np.ndarray] | None = None
        self._once: dict[str, Any] = {}
        self.sorted = in_order(self.nodes)
        self.order = {name: place for place, node in enumerate(self.sorted) for name in node.output}
        self.types: dict[str, int] = {}
        self.shapes: dict[str, list[int | None]] = {}
        self.fault = ""
        if infer:
            found = infer_types(model, self.sorted)
            self.types, self.shapes, self.fault = found.types, found.shapes, found.fault

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value; None for what is computed, absent, damaged, or lies in a file that was not read."""
        if name not in self._values:
            tensor = self.constants.get(name)
            readable = tensor is not None and not tensor_fault(tensor)
            self._values[name] = numpy_helper.to_array(tensor) if readable and tensor is not None else None
        return self._values[name]

    def folded(self, name: str) -> np.ndarray | None:
        """As `value`, and also what follows from constants and from sizes, as long as it is small."""
        if name in self.constants:
            return self.value(name)
        if self._computed is None:
            self._computed = self._fold()
        return self._computed.get(name)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives, computed at the first call with this key."""
        if key not in self._once:
            self._once[key] = make()
        found: T = self._once[key]
        return found

    def constant(self, name: str) -> np.ndarray:
        """Value of a constant that is there."""
        return numpy_helper.to_array(self.constants[name])

    def dequantized(self, node: NodeProto, index: int) -> NodeProto | None:
        """The DequantizeLinear that feeds an input, also through a Transpose, or None."""
        if index >= len(node.input):
            return None
        maker = self.makers.get(node.input[index])
        if maker is not None and maker.op_type == "Transpose" and maker.input:
            maker = self.makers.get(maker.input[0])
        restores = maker is not None and maker.op_type == "DequantizeLinear" and len(maker.input) > 1 and maker.output
        return maker if restores else None

    def shape(self, name: str) -> list[int | None] | None:
        """Sizes of a tensor, or None where not even its rank is known."""
        if name in self.constants:
            return list(self.constants[name].dims)
        return self.shapes.get(name)

    def _fold(self) -> dict[str, np.ndarray]:
        known: dict[str, np.ndarray] = {}
        for node in self.sorted:
            if not node.output or not node.input or node.op_type not in OPERATORS:
                continue
            if node.op_type in ("Shape", "Size"):
                sizes = self.shape(node.input[0])
                fixed = sizes is not None and None not in sizes and math.prod(size or 0 for size in sizes) < 2**62
                values: list[np.ndarray | None] = [_hollow(sizes)] if fixed and sizes is not None else [None]
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


def _hollow(sizes: list[int | None]) -> np.ndarray:
    """Of these sizes, and of no memory: only its shape is looked at."""
    return np.broadcast_to(np.int8(0), [size or 0 for size in sizes])


def _constant(node: NodeProto) -> TensorProto | None:
    """What a Constant holds, however it is written; None for text, for sparse tensors and for nothing."""
    for item in node.attribute:
        if item.name == "value" and item.type == AttributeProto.TENSOR:
            return item.t
        written = {
            "value_float": (TensorProto.FLOAT, [item.f], []),
            "value_int": (TensorProto.INT64, [item.i], []),
            "value_floats": (TensorProto.FLOAT, list(item.floats), [len(item.floats)]),
            "value_ints": (TensorProto.INT64, list(item.ints), [len(item.ints)]),
        }.get(item.name)
        if written is not None:
            kind, numbers, sizes = written
            return helper.make_tensor(next(iter(node.output), ""), kind, sizes, numbers)
    return None


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name and item.type == AttributeProto.INT), default)


def integers(node: NodeProto, name: str) -> list[int]:
    """A list attribute of a node, empty where it is absent."""
    return next((list(item.ints) for item in node.attribute if item.name == name), [])


def text(node: NodeProto, name: str, default: str) -> str:
    """A text attribute of a node."""
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


def title(node: NodeProto) -> str:
    """What a node is called in messages: its name, or what it makes."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '')}"
