"""Insert QuantizeLinear / DequantizeLinear pairs for a target: per-channel weights, per-tensor activations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_edit import copy_without
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.integer_products import integer_products
from edgedetr.quantization.policy import Layer, QuantizationPlan
from edgedetr.quantization.quantized_tensors import quantized_tensors
from edgedetr.quantization.quantized_weight import quantize_weight
from edgedetr.quantization.target import Target, scale_of


def bias_input(layer: Layer, graph: GraphIndex) -> tuple[NodeProto, int] | None:
    """The node that adds a layer's bias, and the index of the input that the bias is; None where no shift can be added.

    A convolution or Gemm without a bias gets one, at input 2: kernels add it at no cost. A matrix product that is not
    followed by an Add of a constant would need one more node, so it stays as it is.
    """
    node = graph.node_by_name[layer.node]
    channels = graph.initializers[layer.weight].dims[layer.axis]
    if layer.op == "MatMul":
        node = graph.only_consumer(node.output[0]) or node
        if node.op_type != "Add":
            return None
        index = 1 if node.input[1] in graph.initializers else 0
    else:
        beta = next((item.f for item in node.attribute if item.name == "beta"), 1.0)
        if layer.op == "Gemm" and beta != 1.0:
            return None
        index = 2
    name = node.input[index] if len(node.input) > index else ""
    if not name:
        return node, index
    constant = graph.initializers.get(name)
    fits = constant is not None and constant.dims and constant.dims[-1] == channels == int(np.prod(constant.dims))
    return (node, index) if fits else None


def insert_qdq(
    graph: GraphIndex,
    plan: QuantizationPlan,
    amax: Mapping[str, float],
    target: Target,
    shifts: Mapping[str, np.ndarray] | None = None,
) -> ModelProto:
    """A copy of the float graph with the plan's nodes quantized for one target. All other names stay.

    amax     {tensor: largest magnitude that INT8 represents}
    shifts   {name of a layer's node: [O] to add to its bias}, for layers for which `bias_input` finds an input
    """
    missing = [name for name in quantized_tensors(graph, plan, target) if name not in amax]
    if missing:
        raise ExportError(
            f"no range for tensor {missing[0]!r} (and {len(missing) - 1} more); the ranges were observed "
            "on another graph or policy; run: edgedetr export BUNDLE --int8"
        )
    return _QdqWriter(graph, plan, amax, target, shifts or {}).write()


def runnable(model: ModelProto, target: Target) -> ModelProto:
    """A Q/DQ graph of `insert_qdq` in the form that its target's kernels run in integers; the same arithmetic.

    The last step: it renames what `insert_qdq` and bias correction find by name.
    """
    return integer_products(model) if target.integer_products else model


class _QdqWriter:
    """Builds the new node list, one float node after the other."""

    def __init__(
        self,
        graph: GraphIndex,
        plan: QuantizationPlan,
        amax: Mapping[str, float],
        target: Target,
        shifts: Mapping[str, np.ndarray],
    ) -> None:
        self.graph, self.target, self.amax, self.shifts = graph, target, amax, shifts
        self.layers = {layer.node: layer for layer in plan.layers}
        biases = [(layer.node, bias_input(layer, graph)) for layer in plan.layers if layer.node in shifts]
        # {name of an Add: (layer, input index)}: the layer's shift goes into the Add that follows it.
        self.bias_adds = {found[0].name: (name, found[1]) for name, found in biases if found and found[0].name != name}
        self.tensors = quantized_tensors(graph, plan, target)
        self.params = {name: target.activation_params(amax[name], graph.never_negative(name)) for name in self.tensors}
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def write(self) -> ModelProto:
        source = self.graph.model
        for item in source.graph.input:
            self._add_pair(item.name)
        for node in source.graph.node:
            self._add_node(node)
        result = copy_without(source, "node", "value_info", "initializer")
        graph = result.graph
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [item for item in source.graph.initializer if item.name in used]
        graph.initializer.extend([*kept, *self.initializers.values()])
        return result

    def _add_node(self, source: NodeProto) -> None:
        node = NodeProto()
        node.CopyFrom(source)
        layer = self.layers.get(source.name)
        if layer is not None:
            self._quantize_parameters(node, layer)
        for index, name in enumerate(source.input):
            if self._reads_dequantized(source.name, index, name):
                node.input[index] = f"{name}_dequantized"
        if source.name in self.bias_adds:
            layer_name, index = self.bias_adds[source.name]
            bias = self.graph.constant(source.input[index])
            self._add_constant(f"{source.name}.bias", bias + self.shifts[layer_name].reshape(bias.shape))
            node.input[index] = f"{source.name}.bias"
        self.nodes.append(node)
        for name in source.output:
            self._add_pair(name)

    def _reads_dequantized(self, node: str, index: int, tensor: str) -> bool:
        quantized = self.tensors.get(tensor)
        return quantized is not None and (quantized.consumers is None or (node, index) in quantized.consumers)

    def _add_pair(self, tensor: str) -> None:
        """Q and DQ behind a tensor that is quantized."""
        if tensor not in self.tensors:
            return
        params = self.params[tensor]
        scale, zero_point = f"{tensor}_scale", f"{tensor}_zero_point"
        self._add_constant(scale, np.asarray(params.scale))
        self._add_constant(zero_point, np.asarray(params.zero_point))
        quantized, restored = f"{tensor}_quantized", f"{tensor}_dequantized"
        for op, source, output in (("QuantizeLinear", tensor, quantized), ("DequantizeLinear", quantized, restored)):
            self.nodes.append(helper.make_node(op, [source, scale, zero_point], [output], f"{tensor}_{op}"))

    def _quantize_parameters(self, node: NodeProto, layer: Layer) -> None:
        """DQ in front of a layer's weight and, for a target with int32 biases, of its bias."""
        data_scale = float(self.params[layer.data].scale)
        bias_name = node.input[2] if len(node.input) > 2 and node.input[2] else None
        bias = self.graph.constant(bias_name).astype(np.float32) if bias_name else None
        # The finest scale that any target gives the input, so that targets with one kind of scale store equal weights.
        weight = quantize_weight(
            self.graph.constant(layer.weight),
            layer.axis,
            bits=self.target.weight_bits,
            bias=bias,
            data_scale=scale_of(self.amax[layer.data]) / 2,
            fp16=self.target.fp16,
        )
        prefix = f"{layer.node}.weight"
        self._add_constant(f"{prefix}_quantized", weight.values)
        self._add_constant(f"{prefix}_scale", weight.scale)
        self._add_constant(f"{prefix}_zero_point", np.zeros(len(weight.scale), dtype=np.int8))
        self._dequantize(node, 1, prefix, layer.axis)
        bias = self._shifted_bias(node, layer, bias)
        if bias is not None and self.target.int32_bias and layer.op == "Conv":
            scale = (weight.scale.astype(np.float64) * data_scale).astype(np.float32)
            prefix = f"{layer.node}.bias"
            integers = np.rint(bias / scale.astype(np.float64))
            self._add_constant(f"{prefix}_quantized", np.clip(integers, -(2**31) + 1, 2**31 - 1).astype(np.int32))
            self._add_constant(f"{prefix}_scale", scale)
            self._add_constant(f"{prefix}_zero_point", np.zeros(len(scale), dtype=np.int32))
            self._dequantize(node, 2, prefix, 0)

    def _shifted_bias(self, node: NodeProto, layer: Layer, bias: np.ndarray | None) -> np.ndarray | None:
        """The bias of a convolution or Gemm with its shift; the weight's scale follows from the bias without it."""
        shift = self.shifts.get(layer.node)
        if shift is None or layer.op == "MatMul":
            return bias
        shape = (len(shift),) if bias is None else bias.shape
        shifted = (shift.reshape(shape) + (0 if bias is None else bias)).astype(np.float32)
        if not (self.target.int32_bias and layer.op == "Conv"):
            self._add_constant(f"{layer.node}.bias", shifted)
        del node.input[2:]
        node.input.append(f"{layer.node}.bias")
        return shifted

    def _dequantize(self, node: NodeProto, index: int, prefix: str, axis: int) -> None:
        names = [f"{prefix}_quantized", f"{prefix}_scale", f"{prefix}_zero_point"]
        restored = f"{prefix}_dequantized"
        name = f"{prefix}_DequantizeLinear"
        self.nodes.append(helper.make_node("DequantizeLinear", names, [restored], name, axis=axis))
        node.input[index] = restored

    def _add_constant(self, name: str, values: np.ndarray) -> None:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name)
