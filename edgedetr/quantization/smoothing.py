"""SmoothQuant: outliers of an activation's channels move into the weights that read it; the network computes the same.

Xiao et al. 2023, "SmoothQuant", eq. 3 and 4: channel j of the activation X is divided by
s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and row j of every weight W that reads X is multiplied by it. The division
costs nothing, because it is folded into the node that makes X: the scale and bias of a LayerNormalization, or weight
and bias of a Linear, also through a Relu (relu(x / s) = relu(x) / s for s > 0). A tensor that has another maker, or
another reader, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_edit import copy_without
from edgedetr.onnx_graph.index import GraphIndex, int_attribute
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.printable import shown
from edgedetr.quantization.policy import Layer, QuantizationPlan, layer_of

PRODUCTS = {"MatMul", "Gemm"}
SMALLEST = 1e-5  # of a factor, as in the authors' code


@dataclass(frozen=True)
class Fold:
    """An activation that can be smoothed.

    tensor    its name, [..., C]
    alpha     how much of its outliers the weights take: 0.5 shares them, 1 moves all
    divided   {constant of the nodes that make it: axis of its C channels}
    readers   the layers that read it, INT8 or not
    """

    tensor: str
    alpha: float
    divided: Mapping[str, int]
    readers: tuple[Layer, ...]


@dataclass(frozen=True)
class Smoothing:
    """What was folded for one tensor: alpha, and the factors s [C] by which its channels are divided."""

    alpha: float
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Folds:
    """possible   the tensors that can be smoothed, in the order of the graph
    left       {tensor: why it stays as it is}
    """

    possible: tuple[Fold, ...]
    left: Mapping[str, str]


def folds_of(graph: GraphIndex, plan: QuantizationPlan, alphas: Mapping[str, float]) -> Folds:
    """Where the inputs of INT8 products can be smoothed.

    alphas   {node: alpha of its input}; 0 = that one is not smoothed. The first node that reads a tensor decides
    """
    wanted: dict[str, float] = {}
    for layer in plan.layers:
        if layer.op in PRODUCTS and alphas.get(layer.node):
            wanted.setdefault(layer.data, alphas[layer.node])
    possible, left = [], {}
    for tensor, alpha in wanted.items():
        found = _fold(tensor, alpha, graph)
        if isinstance(found, Fold):
            possible.append(found)
        else:
            left[tensor] = found
    return Folds(tuple(possible), left)


def smoothings(graph: GraphIndex, folds: Sequence[Fold], batches: Iterable[np.ndarray]) -> dict[str, Smoothing]:
    """{tensor: its factors}, from the largest magnitude of every channel over the images.

    batches   images as the graph takes them, [1, 3, H, W] float32
    """
    largest = _channel_absmax(graph, {fold.tensor: _channels(fold, graph) for fold in folds}, batches)
    found = {}
    for fold in folds:
        rows = np.max([_row_absmax(layer, graph) for layer in fold.readers], axis=0)
        factors = smoothing_factors(largest[fold.tensor], rows, fold.alpha)
        found[fold.tensor] = Smoothing(fold.alpha, tuple(float(factor) for factor in factors))
    return found


def checked_smoothing(name: str, value: object) -> Smoothing:
    """The record of a tensor in ranges.json. Errors: ValueError for what `Ranges.save` does not write."""
    raw: dict[str, Any] = value if isinstance(value, dict) else {}
    factors = raw.get("factors")
    numbers: list[Any] = [raw.get("alpha"), *factors] if isinstance(factors, list) else [None]
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < 3.4e38 for one in numbers):
        raise ValueError(f"smooth of {shown(name)} is {shown(value)}; expected alpha and factors above 0")
    return Smoothing(float(numbers[0]), tuple(float(one) for one in numbers[1:]))


def smoothing_factors(activation: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """[C] float32, by which channels are divided (eq. 4); 1 for a channel that is always 0 on one side.

    activation, weight   [C] largest magnitude of each channel, and of the weights that read it
    """
    used = (activation > 0) & (weight > 0)
    x, w = (np.where(used, side, 1.0).astype(np.float64) for side in (activation, weight))
    return np.where(used, np.maximum(x**alpha / w ** (1 - alpha), SMALLEST), 1.0).astype(np.float32)


def smoothed(graph: GraphIndex, found: Mapping[str, Smoothing]) -> ModelProto:
    """A copy of the float graph with the factors folded in. All names stay, and so does what it computes.

    found   {tensor: its factors}, as `smoothings` gives them. Errors: ExportError where they are of another graph
    """
    scales: dict[str, np.ndarray] = {}
    for tensor, one in found.items():
        fold, factors = _fold(tensor, one.alpha, graph), np.array(one.factors, np.float32)
        if not isinstance(fold, Fold) or len(factors) != _channels(fold, graph):
            raise ExportError(
                f"SmoothQuant: {shown(tensor)} cannot be divided by its {len(factors)} factors; they are of another "
                "graph; run: edgedetr export BUNDLE --int8"
            )
        for name, axis in fold.divided.items():
            scales[name] = scales.get(name, np.float32(1)) * _along(1 / factors, axis, graph.shape(name) or [])
        for layer in fold.readers:
            shape = graph.shape(layer.weight) or []
            scales[layer.weight] = scales.get(layer.weight, np.float32(1)) * _along(factors, 1 - layer.axis, shape)
    result = copy_without(graph.model, "initializer")
    for item in graph.model.graph.initializer:
        scale = scales.get(item.name)
        changed = item if scale is None else numpy_helper.from_array(numpy_helper.to_array(item) * scale, item.name)
        result.graph.initializer.append(changed)
    return result


def _along(factors: np.ndarray, axis: int, shape: Sequence[int | None]) -> np.ndarray:
    """[C] factors in the form in which they multiply an array of this shape along an axis."""
    return factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _channels(fold: Fold, graph: GraphIndex) -> int:
    reader = fold.readers[0]
    return int(graph.initializers[reader.weight].dims[1 - reader.axis])


def _row_absmax(layer: Layer, graph: GraphIndex) -> np.ndarray:
    """[C] the largest magnitude of the weights that read each channel."""
    largest: np.ndarray = np.abs(graph.constant(layer.weight)).max(axis=layer.axis)
    return largest


# --------------------------------------------------------------------------------------------- where a fold is possible


def _fold(tensor: str, alpha: float, graph: GraphIndex) -> Fold | str:
    """The fold of a tensor, or why there is none."""
    if tensor in graph.outputs:
        return "it is an output of the graph"
    readers = []
    for consumer in graph.consumers[tensor]:
        if not _is_product(consumer.node, graph) or consumer.index != 0:
            return f"{consumer.node.op_type} reads it too"
        readers.append(layer_of(consumer.node))
    divided = _made_by(tensor, graph)
    if isinstance(divided, str):
        return divided
    shared = [name for name in (*divided, *(layer.weight for layer in readers)) if len(graph.consumers[name]) > 1]
    if shared:
        return f"the weight {shared[0]} is read twice"
    return Fold(tensor, alpha, divided, tuple(readers))


def _is_product(node: NodeProto, graph: GraphIndex) -> bool:
    """A MatMul or Gemm [..., I] x [I, O] with a constant weight."""
    weight = graph.initializers.get(node.input[1]) if node.op_type in PRODUCTS else None
    return weight is not None and len(weight.dims) == 2 and not int_attribute(node, "transA", 0)


def _made_by(tensor: str, graph: GraphIndex) -> dict[str, int] | str:
    """{constant: axis of the tensor's channels} that scale the tensor, or why there are none."""
    node = graph.producers.get(tensor)
    if node is not None and node.op_type == "Relu":
        tensor = node.input[0]
        if graph.only_consumer(tensor) is None:
            return "more than the Relu reads what the Relu reads"
        node = graph.producers.get(tensor)
    if node is None:
        return "no layer makes it"
    if node.op_type == "LayerNormalization":
        return _constants(node, node.input[1:3], graph)
    bias: list[str] = []
    if node.op_type == "Add":
        constants = [name for name in node.input if name in graph.initializers]
        product = next((graph.producers.get(name) for name in node.input if name not in constants), None)
        if len(constants) != 1 or product is None or graph.only_consumer(product.output[0]) is None:
            return "a sum makes it"
        node, bias = product, constants
    if not _is_product(node, graph):
        return f"{node.op_type} makes it"
    bias += [name for name in node.input[2:3] if name]
    found = _constants(node, bias, graph)
    return found if isinstance(found, str) else {node.input[1]: layer_of(node).axis, **found}


def _constants(node: NodeProto, names: Iterable[str], graph: GraphIndex) -> dict[str, int] | str:
    """{constant [C] or [1, .., C]: its last axis}."""
    found = {}
    for name in filter(None, names):
        shape = list(graph.initializers[name].dims) if name in graph.initializers else []
        if not shape or math.prod(shape) != shape[-1]:
            return f"{node.op_type} makes it, with parameters that are not one per channel"
        found[name] = len(shape) - 1
    return found


# ----------------------------------------------------------------------------------------------------- observe channels


def _channel_absmax(
    graph: GraphIndex, tensors: Mapping[str, int], batches: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """{tensor [..., C]: [C] largest magnitude of each channel over the images}; tensors: {name: C}."""
    data = _with_maxima(graph, tensors).SerializeToString()  # only the bytes stay in memory
    session = GraphSession(data, [f"{name}/channels" for name in tensors], optimize=True, lean=True)
    found: dict[str, np.ndarray] = {}
    for batch in batches:
        values = session.run({"images": batch})
        for name in tensors:
            new = values[f"{name}/channels"]
            found[name] = np.maximum(found[name], new) if name in found else new
    return found


def _with_maxima(graph: GraphIndex, tensors: Mapping[str, int]) -> ModelProto:
    """The graph with the outputs TENSOR/channels; the nodes stand last, as probe.py explains."""
    model = copy_without(graph.model, "output")
    body = model.graph
    as_input = graph.opset >= 18  # when the axes of ReduceMax became an input
    if as_input:
        body.initializer.append(numpy_helper.from_array(np.array([0]), "channels/axes"))
    for name, channels in reversed(list(tensors.items())):
        rows, shape = f"{name}/rows", f"{name}/channels/shape"
        body.initializer.append(numpy_helper.from_array(np.array([-1, channels]), shape))
        body.node.append(helper.make_node("Reshape", [name, shape], [rows]))
        body.node.append(helper.make_node("Abs", [rows], [f"{rows}/abs"]))
        maximum = helper.make_node("ReduceMax", [f"{rows}/abs"], [f"{name}/channels"], keepdims=0)
        if as_input:
            maximum.input.append("channels/axes")
        else:
            maximum.attribute.append(helper.make_attribute("axes", [0]))
        body.node.append(maximum)
    body.output.extend(helper.make_empty_tensor_value_info(f"{name}/channels") for name in tensors)
    return model
