"""Which activations a target quantizes for a plan, and which therefore need a range."""

from __future__ import annotations

from dataclasses import dataclass

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import QuantizationPlan
from edgedetr.quantization.target import CPU, TENSORRT, Target


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
