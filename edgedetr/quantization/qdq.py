"""Rewrite a float graph as an INT8 graph for a target: split convolutions behind a Concat, then insert Q/DQ pairs.

`split_concats` comes before the plan and the calibration, since it changes which tensors exist. `insert_qdq` writes
QuantizeLinear / DequantizeLinear pairs: per-channel weights, per-tensor activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.artifacts import INT8, INT8_CPU, Artifact
from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_edit import prune
from edgedetr.onnx_graph.hardware_limits import SMALLEST_FP16
from edgedetr.onnx_graph.index import GraphIndex, int_attribute
from edgedetr.options import one_of
from edgedetr.quantization.integer_products import integer_products
from edgedetr.quantization.policy import Layer, QuantizationPlan
from edgedetr.runtime.cpu import int8_saturates

# --------------------------------------------------------------------------------------------- convolutions of a Concat
# A 1x1 convolution that reads a Concat becomes one convolution per branch and a sum. Each branch then has its own
# range, and nothing is quantized behind the Concat, where OpenVINO's kernels have been seen to diverge from the
# arithmetic of the graph. A branch that comes from a nearest-neighbor Resize is convolved before it: the two commute,
# and there it has fewer pixels. It costs no time: D-FINE-N, whose blocks of HGNetV2 join four branches, takes 20.7 ms
# split, 21.1 with one range on all branches and 26.3 with these convolutions in float in ONNX Runtime (float32 29.3);
# 15.8, 15.6 and 21.0 in OpenVINO (25.9); 320 px, CPU time of one thread, in turns.


def split_concats(model: ModelProto) -> ModelProto:
    """A copy that computes the same, in which 1x1 convolutions read the branches of a Concat one by one."""
    graph = GraphIndex(model)
    widths = _channels(graph)
    result = ModelProto()
    result.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        concat = graph.producers.get(node.input[0]) if node.input else None
        parts = [widths.get(name) for name in concat.input] if concat is not None else []
        if concat is None or not _splittable(node, concat, graph) or None in parts:
            nodes.append(node)
            continue
        nodes.extend(_split(node, concat, [int(part) for part in parts if part is not None], graph, result))
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    prune(result)
    return result


def _splittable(node: NodeProto, concat: NodeProto, graph: GraphIndex) -> bool:
    """A plain 1x1 Conv with a constant weight that reads a Concat of channels."""
    if node.op_type != "Conv" or concat.op_type != "Concat" or int_attribute(concat, "axis", 1) != 1:
        return False
    weight = graph.initializers.get(node.input[1])
    unstrided = all(size == 1 for item in node.attribute if item.name == "strides" for size in item.ints)
    padded = any(size for item in node.attribute if item.name == "pads" for size in item.ints)
    pointwise = weight is not None and list(weight.dims[2:]) == [1, 1]
    return pointwise and unstrided and not padded and int_attribute(node, "group", 1) == 1


def _split(
    node: NodeProto, concat: NodeProto, widths: list[int], graph: GraphIndex, result: ModelProto
) -> list[NodeProto]:
    """One Conv per branch, the bias in the last, and their sum under the old output name."""
    weight = graph.constant(node.input[1])
    made: list[NodeProto] = []
    outputs: list[str] = []
    start = 0
    for index, (branch, width) in enumerate(zip(concat.input, widths)):
        part = np.ascontiguousarray(weight[:, start : start + width])
        start += width
        name = f"{node.name}/branch.{index}"
        result.graph.initializer.append(numpy_helper.from_array(part, f"{name}.weight"))
        bias = list(node.input[2:3]) if index == len(widths) - 1 else []
        producer = graph.producers.get(branch)
        resize = producer if producer is not None and _is_nearest_resize(producer) and not bias else None
        conv = NodeProto()
        conv.CopyFrom(node)
        del conv.input[:], conv.output[:]
        conv.name = name
        conv.input.extend([branch if resize is None else resize.input[0], f"{name}.weight", *bias])
        conv.output.append(f"{name}_output_0")
        made.append(conv)
        if resize is not None:
            resized = NodeProto()
            resized.CopyFrom(resize)
            resized.name = f"{name}/resize"
            resized.input[0] = conv.output[0]
            resized.output[0] = f"{name}/resize_output_0"
            made.append(resized)
        outputs.append(made[-1].output[0])
    total = outputs[-1]
    for index, other in enumerate(outputs[-2::-1]):
        output = node.output[0] if index == len(outputs) - 2 else f"{node.name}/sum.{index}_output_0"
        made.append(helper.make_node("Add", [total, other], [output], f"{node.name}/sum.{index}"))
        total = output
    return made


def _is_nearest_resize(node: NodeProto) -> bool:
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"nearest")
    return node.op_type == "Resize" and mode == b"nearest"


def _channels(graph: GraphIndex) -> dict[str, int]:
    """Channels of the tensors whose number follows from the convolutions before them."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type == "Conv" and node.input[1] in graph.initializers:
            found[node.output[0]] = int(graph.initializers[node.input[1]].dims[0])
        elif node.op_type in ("Relu", "Sigmoid", "Mul", "Resize", "MaxPool", "AveragePool", "Add", "Identity"):
            known = [found[name] for name in node.input if name in found]
            if known:
                found[node.output[0]] = max(known)
        elif (
            node.op_type == "Concat"
            and all(name in found for name in node.input)
            and int_attribute(node, "axis", 1) == 1
        ):
            found[node.output[0]] = sum(found[name] for name in node.input)
    return found


# --------------------------------------------------------------------------------------------------- scales and targets
# A target is the form in which one quantized set is written for one kind of runtime. Both are symmetric with scale
# amax / 127. TensorRT accepts signed int8 with zero point 0 only, and under strong typing a scale has the type of its
# tensor, which is FP16: there each scale is the next larger normal FP16 number. ONNX Runtime's kernels need uint8
# activations: a signed tensor is stored with zero point 128 and the same scale, a non-negative one with zero point 0
# and half the scale, which contains every level of the signed grid and those between.

# Far above float32's smallest normal number, also when two scales are multiplied; a tensor that is always 0 gets 1.
MIN_SCALE = 1e-12


def scale_of(amax: float) -> float:
    """The scale of the signed grid: the distance of two neighboring levels."""
    return max(amax / 127, MIN_SCALE) if amax > 0 else 1.0


def fp16_scales(scale: np.ndarray) -> np.ndarray:
    """The smallest normal FP16 numbers that are at least these, as float32; at most a factor of 1.001 larger.

    Weights and activations are divided by the rounded scale, so that nothing is lost when it is stored as FP16.
    """
    wanted = np.asarray(scale, dtype=np.float32)
    near = wanted.astype(np.float16)
    near = np.where(near.astype(np.float32) < wanted, np.nextafter(near, np.float16(np.inf)), near)
    return np.maximum(near.astype(np.float32), np.float32(SMALLEST_FP16))


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of a tensor: its values are (integer - zero_point) * scale."""

    scale: np.float32
    zero_point: np.generic  # np.int8 or np.uint8


@dataclass(frozen=True)
class Target:
    """How a quantized graph is written for one kind of runtime.

    artifact          the file of a bundle that is written in this form
    uint8             activations are uint8
    quantize_outputs  outputs of convolutions and of residual sums are quantized too, for every consumer
    int32_bias        biases of convolutions are int32 with scale = input scale x weight scale
    integer_products  matrix products are two-dimensional, with int32 biases (see integer_products.py)
    fp16              everything that is not INT8 is FP16, the scales too
    weight_bits       8, or 7 where products of two neighbors would saturate 16 bits (x86 without VNNI)
    """

    artifact: Artifact
    uint8: bool
    quantize_outputs: bool
    int32_bias: bool
    integer_products: bool
    fp16: bool = False
    weight_bits: int = 8

    @property
    def name(self) -> str:
        return self.artifact.target

    def activation_params(self, amax: float, never_negative: bool) -> QuantParams:
        """Scale and zero point for a tensor with this largest magnitude."""
        scale = float(fp16_scales(np.float32(scale_of(amax)))) if self.fp16 else scale_of(amax)
        if not self.uint8:
            return QuantParams(np.float32(scale), np.int8(0))
        if never_negative:
            return QuantParams(np.float32(scale / 2), np.uint8(0))
        return QuantParams(np.float32(scale), np.uint8(128))


TENSORRT = Target(INT8, uint8=False, quantize_outputs=False, int32_bias=False, integer_products=False, fp16=True)
CPU = Target(INT8_CPU, uint8=True, quantize_outputs=True, int32_bias=True, integer_products=True)


def weight_bits(choice: str) -> int:
    """8 or 7 for "8bit" / "7bit"; "auto" is 7 on an x86 CPU without VNNI, whose 16-bit sums saturate."""
    one_of("quant.cpu_weights", choice, ("auto", "8bit", "7bit"))
    if choice != "auto":
        return int(choice[0])
    return 7 if int8_saturates() else 8


# ------------------------------------------------------------------------------------------ where Q/DQ pairs are placed


@dataclass
class QuantizedTensor:
    """A tensor that gets a Q/DQ pair.

    consumers   {(node name, input index)} that read the dequantized tensor; None = all of them
    """

    name: str
    consumers: set[tuple[str, int]] | None


def quantized_tensors(graph: GraphIndex, plan: QuantizationPlan, target: Target) -> dict[str, QuantizedTensor]:
    """The activations that a target quantizes, by name."""
    found: dict[str, QuantizedTensor] = {}

    def add(tensor: str, node: str, index: int) -> None:
        quantized = found.setdefault(tensor, QuantizedTensor(tensor, set()))
        if quantized.consumers is not None:
            quantized.consumers.add((node, index))

    for layer in plan.layers:
        add(layer.data, layer.node, 0)
    for item in plan.residuals:
        add(item.tensor, item.node, item.index)
    for product in plan.products:
        for index, tensor in enumerate(product.inputs):
            add(tensor, product.node, index)
    for node in graph.nodes:
        # A pool of integers is a quarter of the memory traffic, and exact: both sides share one scale.
        if node.op_type == "MaxPool" and node.output[0] in found:
            add(node.input[0], node.name, 0)
    if target.quantize_outputs:
        for tensor in _layer_outputs(graph, plan):
            found[tensor] = QuantizedTensor(tensor, None)
    return found


def tensors_to_observe(graph: GraphIndex, plan: QuantizationPlan) -> list[str]:
    """Every activation that some target quantizes: these need a range."""
    names = [*quantized_tensors(graph, plan, TENSORRT), *quantized_tensors(graph, plan, CPU)]
    return list(dict.fromkeys(names))


def _layer_outputs(graph: GraphIndex, plan: QuantizationPlan) -> list[str]:
    """Tensors that ONNX Runtime needs quantized to run the node before them in integers."""
    names = [layer.node for layer in plan.layers if layer.op == "Conv"] + [item.node for item in plan.residuals]
    found = []
    for name in names:
        tensor = graph.after_relu(graph.node_by_name[name].output[0])
        if tensor in graph.outputs:
            continue
        found.append(tensor)
        consumer = graph.only_consumer(tensor)
        if consumer is not None and consumer.op_type == "MaxPool":
            found.append(consumer.output[0])
    return found


# ----------------------------------------------------------------------------------------------------- insert the pairs


@dataclass(frozen=True)
class QuantizedWeight:
    """values int8, of the float weight's shape; scale [O] float32 along the output-channel axis."""

    values: np.ndarray
    scale: np.ndarray


def quantize_weight(
    weight: np.ndarray,
    axis: int,
    *,
    bits: int = 8,
    bias: np.ndarray | None = None,
    data_scale: float = 1.0,
    fp16: bool = False,
) -> QuantizedWeight:
    """Symmetric, per output channel: every value lies within half a step of its level.

    weight      float32, output channels along `axis`
    bias        [O] float32 or None; a channel with tiny weights gets a scale large enough for its bias to fit int32
    data_scale  scale of the layer's input, for the same purpose
    fp16        round the scales up to FP16 numbers
    """
    limit = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float64)
    scale = np.maximum(largest / limit, MIN_SCALE)
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias) / (data_scale * 2**30))
    scale = fp16_scales(scale) if fp16 else scale.astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    values = np.clip(np.rint(weight / scale.reshape(shape)), -limit, limit).astype(np.int8)
    return QuantizedWeight(values, scale)


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
        result = ModelProto()
        result.CopyFrom(source)
        graph = result.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
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
