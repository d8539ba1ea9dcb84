"""Write QuantizeLinear / DequantizeLinear pairs into a float graph: per-channel weights, per-tensor activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.bias_correction import bias_of
from edgedetr.quantization.policy import Layer, Plan
from edgedetr.quantization.targets import SMALLEST_SCALE, Cut, Dialect, Grid, cuts, half_steps, step


@dataclass(frozen=True)
class IntegerWeight:
    """values int8, as the float weight; scale [O] float32 along the output-channel axis."""

    values: np.ndarray
    scale: np.ndarray


def quantize_weight(
    weight: np.ndarray,
    axis: int,
    *,
    bits: int = 8,
    bias: np.ndarray | None = None,
    data_scale: float = 1.0,
    half: bool = False,
) -> IntegerWeight:
    """Symmetric, per output channel: every value lies within half a step of its level.

    weight      float32, output channels along `axis`
    bias        [O] float32 or None; a channel whose weights are tiny gets a step large enough for its bias to fit int32
    data_scale  step of the layer's input, for that same purpose
    half        the steps are FP16 numbers
    """
    limit = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float64)
    scale = np.maximum(largest / limit, SMALLEST_SCALE)
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias) / (data_scale * 2**30))
    scale = half_steps(scale) if half else scale.astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    values = np.clip(np.rint(weight / scale.reshape(shape)), -limit, limit).astype(np.int8)
    return IntegerWeight(values, scale)


def insert(
    model: ModelProto,
    plan: Plan,
    amax: dict[str, float],
    dialect: Dialect,
    shifts: Mapping[str, np.ndarray] | None = None,
) -> ModelProto:
    """A copy of the float graph with the plan's nodes quantized in one dialect. Names of everything else stay.

    shifts   {name of a layer's node: [O] to add to its bias}, for layers that `bias_of` finds a place for
    """
    missing = [name for name in cuts(model, plan, dialect) if name not in amax]
    if missing:
        raise ExportError(
            f"no range for tensor {missing[0]!r} (and {len(missing) - 1} more); the ranges were observed "
            "on another graph or policy; run: edgedetr export BUNDLE --int8"
        )
    return _Writer(model, plan, amax, dialect, shifts or {}).write()


class _Writer:
    """Builds the new node list, one float node after the other."""

    def __init__(
        self, model: ModelProto, plan: Plan, amax: dict[str, float], dialect: Dialect, shifts: Mapping[str, np.ndarray]
    ) -> None:
        self.source, self.dialect, self.amax, self.shifts = model, dialect, amax, shifts
        self.graph = GraphIndex(model)
        self.layers = {layer.node: layer for layer in plan.layers}
        places = [(layer.node, bias_of(layer, self.graph)) for layer in plan.layers if layer.node in shifts]
        # The layer whose shift goes into the Add behind it.
        self.added = {place[0].name: (name, place[1]) for name, place in places if place and place[0].name != name}
        self.cuts = cuts(model, plan, dialect)
        self.grids = {name: dialect.grid(amax[name], self.graph.never_negative(name)) for name in self.cuts}
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def write(self) -> ModelProto:
        for item in self.source.graph.input:
            self._pair(item.name)
        for node in self.source.graph.node:
            self._node(node)
        result = ModelProto()
        result.CopyFrom(self.source)
        graph = result.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [item for item in self.source.graph.initializer if item.name in used]
        graph.initializer.extend([*kept, *self.initializers.values()])
        return result

    def _node(self, source: NodeProto) -> None:
        node = NodeProto()
        node.CopyFrom(source)
        layer = self.layers.get(source.name)
        if layer is not None:
            self._weights(node, layer)
        for index, name in enumerate(source.input):
            if self._reads_pair(source.name, index, name):
                node.input[index] = f"{name}_dequantized"
        if source.name in self.added:
            layer_name, index = self.added[source.name]
            bias = self.graph.constant(source.input[index])
            self._constant(f"{source.name}.bias", bias + self.shifts[layer_name].reshape(bias.shape))
            node.input[index] = f"{source.name}.bias"
        if self.dialect.deep_bias:
            self._deepen_bias(node)
        self.nodes.append(node)
        for name in source.output:
            self._pair(name)

    def _deepen_bias(self, node: NodeProto) -> None:
        """Give the bias behind a quantized MatMul the shape [1, 1, O].

        ONNX Runtime turns MatMul + Add of a [O] bias into a float Gemm before it looks for Q/DQ, and the integer
        product is lost; it does not do so for this shape.
        """
        if node.op_type != "Add":
            return
        makers = [self.graph.producers.get(name) for name in node.input]
        for index, name in enumerate(node.input):
            other = makers[1 - index]
            product = other is not None and other.name in self.layers and other.op_type == "MatMul"
            if product and name in self.graph.initializers and len(self.graph.initializers[name].dims) == 1:
                bias = self.initializers.get(node.input[index], self.graph.initializers[name])
                self._constant(f"{node.name}.bias", numpy_helper.to_array(bias).reshape(1, 1, -1))
                node.input[index] = f"{node.name}.bias"

    def _reads_pair(self, node: str, index: int, tensor: str) -> bool:
        cut: Cut | None = self.cuts.get(tensor)
        return cut is not None and (cut.readers is None or (node, index) in cut.readers)

    def _pair(self, tensor: str) -> None:
        """Q and DQ behind a tensor that has a cut."""
        if tensor not in self.cuts:
            return
        grid: Grid = self.grids[tensor]
        scale, zero = f"{tensor}_scale", f"{tensor}_zero_point"
        self._constant(scale, np.asarray(grid.scale))
        self._constant(zero, np.asarray(grid.zero_point))
        quantized, restored = f"{tensor}_quantized", f"{tensor}_dequantized"
        for kind, source, target in (("QuantizeLinear", tensor, quantized), ("DequantizeLinear", quantized, restored)):
            self.nodes.append(helper.make_node(kind, [source, scale, zero], [target], f"{tensor}_{kind}"))

    def _weights(self, node: NodeProto, layer: Layer) -> None:
        """DQ in front of a layer's weight and, in a dialect that has it, of its bias."""
        data_scale = float(self.grids[layer.data].scale)
        bias_name = node.input[2] if len(node.input) > 2 and node.input[2] else None
        bias = self.graph.constant(bias_name).astype(np.float32) if bias_name else None
        # The finest grid that any dialect gives the input, so that dialects of one kind of step store the same weights.
        weight = quantize_weight(
            self.graph.constant(layer.weight),
            layer.axis,
            bits=self.dialect.weight_bits,
            bias=bias,
            data_scale=step(self.amax[layer.data]) / 2,
            half=self.dialect.half,
        )
        prefix = f"{layer.node}.weight"
        self._constant(f"{prefix}_quantized", weight.values)
        self._constant(f"{prefix}_scale", weight.scale)
        self._constant(f"{prefix}_zero_point", np.zeros(len(weight.scale), dtype=np.int8))
        self._dequantize(node, 1, prefix, layer.axis)
        bias = self._shifted(node, layer, bias)
        if bias is not None and self.dialect.integer_bias and layer.op == "Conv":
            steps = (weight.scale.astype(np.float64) * data_scale).astype(np.float32)
            prefix = f"{layer.node}.bias"
            integers = np.rint(bias / steps.astype(np.float64))
            self._constant(f"{prefix}_quantized", np.clip(integers, -(2**31) + 1, 2**31 - 1).astype(np.int32))
            self._constant(f"{prefix}_scale", steps)
            self._constant(f"{prefix}_zero_point", np.zeros(len(steps), dtype=np.int32))
            self._dequantize(node, 2, prefix, 0)

    def _shifted(self, node: NodeProto, layer: Layer, bias: np.ndarray | None) -> np.ndarray | None:
        """The bias of a convolution or Gemm with its shift; the weight's steps stay those of the bias without it."""
        shift = self.shifts.get(layer.node)
        if shift is None or layer.op == "MatMul":
            return bias
        shape = (len(shift),) if bias is None else bias.shape
        moved = (shift.reshape(shape) + (0 if bias is None else bias)).astype(np.float32)
        if not (self.dialect.integer_bias and layer.op == "Conv"):
            self._constant(f"{layer.node}.bias", moved)
        del node.input[2:]
        node.input.append(f"{layer.node}.bias")
        return moved

    def _dequantize(self, node: NodeProto, index: int, prefix: str, axis: int) -> None:
        names = [f"{prefix}_quantized", f"{prefix}_scale", f"{prefix}_zero_point"]
        restored = f"{prefix}_dequantized"
        name = f"{prefix}_DequantizeLinear"
        self.nodes.append(helper.make_node("DequantizeLinear", names, [restored], name, axis=axis))
        node.input[index] = restored

    def _constant(self, name: str, values: np.ndarray) -> None:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name)
