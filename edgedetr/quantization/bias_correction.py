"""Bias correction: add the mean error of each INT8 layer's output, which rounding causes, back to the layer's bias.

Nagel et al. 2019, "Data-Free Quantization", section 4.2, in its empirical form: per output channel, the mean over
images of W x - W_q x_q, where x_q comes from the layers before, which have been corrected. One channel has too few
weights for their rounding errors to cancel; where the input is never negative, the remaining error shifts the mean.

To correct layer after layer would take as many passes over the images as there are layers. Here the layers are divided
into a few parts, in the order of the graph. Within a part, each image's own mean error replaces the mean error over all
images, which is known only after the pass; the layers of earlier parts have their final biases. The float graph takes
one pass, for all of its quantized graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgedetr.onnx_graph.graph_edit import copy_without, prune
from edgedetr.onnx_graph.graph_walk import captured
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.policy import Layer, QuantizationPlan
from edgedetr.quantization.qdq import bias_input

IMAGES = 64  # at most; of the demonstration's 96, 32 leave twice the error in the means that all leave
PARTS = 4  # passes of the quantized graph over the images, each over the layers up to the end of its part


class BiasCorrection:
    """Corrects biases of the quantized graphs of one float graph, which itself runs once over the images.

    graph     the float graph
    layers    all that any of its quantized graphs has in INT8
    batches   yields the images as the graph takes them, [1, 3, H, W] float32; called once per pass

    Memory: the activations of one image, and [I, O] numbers per layer.
    """

    def __init__(self, graph: GraphIndex, layers: Iterable[Layer], batches: Callable[[], Iterable[np.ndarray]]) -> None:
        self.graph, self.batches = graph, batches
        self._layers = list(layers)

    def shifts(self, quantized: ModelProto, plan: QuantizationPlan, parts: int = PARTS) -> dict[str, np.ndarray]:
        """{name of a layer's node: [O] float32 to add to its bias}, for every layer that has a bias input.

        quantized   the float graph with Q/DQ pairs, in float32, with uncorrected biases
        plan        its layers are among those of this object
        parts       more are more exact, up to the number of layers

        Behind each layer, the mean of every channel is corrected before the following layers read it, so that a layer's
        shift does not include those of the layers before it.
        """
        chosen = {layer.node for layer in plan.layers}
        if missing := chosen - {layer.node for layer in self._layers}:
            raise ValueError(f"{len(missing)} layers are not among those of this object, as {min(missing)}")
        layers = [layer for layer in self._corrected if layer.node in chosen]
        shifts: dict[str, np.ndarray] = {}
        for part in np.array_split(np.arange(len(layers)), min(parts, len(layers))) if layers else ():
            shifts |= self._part(quantized, [layers[i] for i in part], shifts)
        return shifts

    @cached_property
    def _corrected(self) -> list[Layer]:
        """Layers that have a bias input."""
        return [layer for layer in self._layers if bias_input(layer, self.graph) is not None]

    @cached_property
    def _means(self) -> list[dict[str, np.ndarray]]:
        """[I] {layer: mean of its output over each channel, [1, O, 1, 1] or [1, O]}, in the float graph."""
        layers = {layer.node: layer for layer in self._corrected}
        nodes: list[NodeProto] = []
        constants, outputs = dict(self.graph.initializers), {}
        for node in self.graph.nodes:
            nodes.append(node)
            if layer := layers.get(node.name):  # its mean comes just behind it, so that its output can go
                outputs[layer.node] = f"{node.output[0]}/mean"
                nodes += _channel_means(node.output[0], outputs[layer.node], layer, self.graph, constants)
        session = _session(self.graph.model, nodes, constants, list(outputs.values()))
        found = []
        for batch in self.batches():
            values = session.run({"images": batch})
            found.append({layer: values[output] for layer, output in outputs.items()})
        return found

    def _part(
        self, quantized: ModelProto, part: Sequence[Layer], known: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """{layer: [O] float32, mean of its shift over the images}.

        part    the layers whose shifts are measured
        known   shifts of the layers before them
        """
        layers = {layer.node: layer for layer in part}
        constants = {item.name: item for item in (*self.graph.initializers.values(), *quantized.graph.initializer)}
        nodes: list[NodeProto] = []
        shifts: dict[str, str] = {}
        exact: dict[str, str] = {}
        for source in quantized.graph.node:
            if source.name not in layers and source.name not in known:
                nodes.append(source)
                continue
            node = NodeProto.FromString(source.SerializeToString())
            corrected = node.output[0]
            raw, shift = f"{corrected}/raw", f"{corrected}/shift"
            node.output[0] = raw
            nodes.append(node)
            if source.name in layers:
                layer = layers[source.name]
                mean = f"{corrected}/mean"
                exact[layer.node], shifts[layer.node] = f"{corrected}/float mean", shift
                nodes += _channel_means(raw, mean, layer, self.graph, constants)
                nodes.append(helper.make_node("Sub", [exact[layer.node], mean], [shift]))
            else:
                weight = self.graph.initializers[self.graph.node_by_name[source.name].input[1]]
                trailing = len(weight.dims) - 2  # axes behind the channels: 2 of a convolution
                value = known[source.name].reshape(-1, *[1] * trailing)
                constants[shift] = numpy_helper.from_array(value, shift)
            nodes.append(helper.make_node("Add", [raw, shift], [corrected]))
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, self._means[0][layer].shape)
            for layer, name in exact.items()
        ]
        session = _session(quantized, nodes, constants, list(shifts.values()), inputs)
        sums = {layer: np.zeros(0) for layer in layers}
        for number, batch in enumerate(self.batches()):
            means = self._means[number]
            values = session.run({"images": batch, **{name: means[layer] for layer, name in exact.items()}})
            for name, output in shifts.items():
                flat = values[output].reshape(-1).astype(np.float64)
                sums[name] = sums[name] + flat if number else flat
        return {layer: (total / len(self._means)).astype(np.float32) for layer, total in sums.items()}


def _session(
    model: ModelProto,
    nodes: list[NodeProto],
    constants: Mapping[str, TensorProto],
    outputs: list[str],
    inputs: Sequence[ValueInfoProto] = (),
) -> GraphSession:
    """A session for a model with the inputs of `model` and these, of the nodes that the outputs need."""
    result = copy_without(model, "node", "initializer", "output")
    graph = result.graph
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    prune(result)
    read = {name for node in graph.node for name in (*node.input, *captured(node))}
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)
    # Without optimizations: Q/DQ in float arithmetic, as the graph is written, on every CPU.
    return GraphSession(result.SerializeToString(), outputs, integers=False, lean=True, in_order=True)


def _channel_means(
    tensor: str, mean: str, layer: Layer, graph: GraphIndex, constants: dict[str, TensorProto]
) -> list[NodeProto]:
    """Nodes for the mean of a layer's output over each channel, [1, O, 1, 1] or [1, O]."""
    nodes = []
    shape = graph.initializers[layer.weight].dims
    if layer.op == "MatMul":  # of any rank, channels last
        rows = f"{tensor}/rows"
        constants[f"{rows}/shape"] = numpy_helper.from_array(np.array([-1, shape[layer.axis]]), f"{rows}/shape")
        nodes.append(helper.make_node("Reshape", [tensor, f"{rows}/shape"], [rows]))
        tensor = rows
    axes = [0, *range(2, len(shape))] if layer.op == "Conv" else [0]
    constants[f"{mean}/axes"] = numpy_helper.from_array(np.array(axes), f"{mean}/axes")
    return [*nodes, helper.make_node("ReduceMean", [tensor, f"{mean}/axes"], [mean], keepdims=1)]
