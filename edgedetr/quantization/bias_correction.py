"""Bias correction: add the mean error of each INT8 layer's output, which rounding causes, back to the layer's bias.

Nagel et al. 2019, "Data-Free Quantization", section 4.2, in its empirical form: per output channel, the mean over
images of W x - W_q x_q, where x_q comes from the layers before, which have been corrected. One channel has too few
weights for their rounding errors to cancel; where the input is never negative, the remaining error shifts the mean.

To correct layer after layer would take as many passes over the images as there are layers. Here the layers are divided
into a few parts, in the order of the graph. Within a part, each image's own mean error replaces the mean error over all
images, which is known only after the pass; the layers of earlier parts have their final biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.graph_edit import copy_without, prune
from edgedetr.onnx_graph.graph_walk import captured
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.policy import Layer, QuantizationPlan
from edgedetr.quantization.qdq import bias_input

IMAGES = 64  # at most; of the demonstration's 96, 32 leave twice the error in the means that all leave
PARTS = 4  # passes over the images, each over the layers up to the end of its part
INT8_PREFIX = "int8/"  # before the names of the nodes and tensors of the quantized half


def bias_shifts(
    graph: GraphIndex,
    quantized: ModelProto,
    plan: QuantizationPlan,
    batches: Callable[[], Iterable[np.ndarray]],
    parts: int = PARTS,
) -> dict[str, np.ndarray]:
    """{name of a layer's node: [O] float32 to add to its bias}, for every layer that has a bias input.

    graph       the float graph
    quantized   the same with Q/DQ pairs, in float32, with uncorrected biases
    batches     yields the images as the graph takes them, [1, 3, H, W] float32; called once per part
    parts       more are more exact, up to the number of layers

    Both graphs run as one model, one image at a time. Behind each layer of the quantized half, the mean of every
    channel is corrected before the following layers read it, so that a layer's shift does not include those of the
    layers before it. Memory: the activations of one image and [O] numbers per layer.
    """
    layers = [layer for layer in plan.layers if bias_input(layer, graph) is not None]
    shifts: dict[str, np.ndarray] = {}
    for part in np.array_split(np.arange(len(layers)), min(parts, len(layers))) if layers else ():
        shifts |= _mean_outputs(*_joint_model(graph, quantized, [layers[i] for i in part], shifts), batches())
    return shifts


def _mean_outputs(model: bytes, outputs: Mapping[str, str], batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """{layer: [O] float32, mean of its output over the images}; outputs: {layer: name of an output}."""
    # Without optimizations: Q/DQ in float arithmetic, as the graph is written, on every CPU.
    session = GraphSession(model, list(outputs.values()), integers=False, lean=True, in_order=True)
    sums = {layer: np.zeros(0) for layer in outputs}
    count = 0
    for batch in batches:
        values = session.run({"images": batch})
        for layer, output in outputs.items():
            flat = values[output].reshape(-1).astype(np.float64)
            sums[layer] = sums[layer] + flat if count else flat
        count += 1
    return {layer: (total / count).astype(np.float32) for layer, total in sums.items()}


def _joint_model(
    graph: GraphIndex, quantized: ModelProto, part: Sequence[Layer], known: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, str]]:
    """Float and quantized graph in one serialized model, and {layer's node: the output that is its shift}.

    part    the layers whose shifts are measured
    known   shifts of the layers before them
    """
    layers = {layer.node: layer for layer in part}
    made = {name for node in quantized.graph.node for name in node.output}
    constants = {item.name: item for item in (*graph.model.graph.initializer, *quantized.graph.initializer)}
    exact = [NodeProto.FromString(node.SerializeToString()) for node in graph.nodes]
    place = {node.name: number for number, node in enumerate(exact)}
    nodes: list[NodeProto] = []
    taken = (
        0  # of `exact`: each comes just before its quantized form, so that its output goes as soon as it is compared
    )
    outputs: dict[str, str] = {}
    for source in quantized.graph.node:
        upto = max(taken, place.get(source.name, -1) + 1)
        nodes += exact[taken:upto]
        taken = upto
        node = NodeProto.FromString(source.SerializeToString())
        node.name = INT8_PREFIX + source.name
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = INT8_PREFIX + name if name in made else name
        nodes.append(node)
        layer, corrected = layers.get(source.name), node.output[0]
        if layer is not None:
            node.output[0], outputs[layer.node] = f"{corrected}/raw", f"{corrected}/shift"
            nodes += _correction(source.output[0], corrected, layer, graph, constants)
        elif source.name in known:
            node.output[0] = f"{corrected}/raw"
            weight = graph.initializers[graph.node_by_name[source.name].input[1]]
            trailing = len(weight.dims) - 2  # axes behind the channels: 2 of a convolution
            shift = known[source.name].reshape(-1, *[1] * trailing)
            constants[f"{corrected}/shift"] = numpy_helper.from_array(shift, f"{corrected}/shift")
            nodes.append(helper.make_node("Add", [f"{corrected}/raw", f"{corrected}/shift"], [corrected]))
    nodes += exact[taken:]
    return _model_of(graph.model, nodes, constants, list(outputs.values())).SerializeToString(), outputs


def _correction(
    exact: str, corrected: str, layer: Layer, graph: GraphIndex, constants: dict[str, TensorProto]
) -> list[NodeProto]:
    """Nodes for corrected = raw + shift; shift, [1, O, 1, 1] or [1, O], is the mean of exact - raw per channel."""
    raw, error, shift = (f"{corrected}/{word}" for word in ("raw", "error", "shift"))
    nodes = [helper.make_node("Sub", [exact, raw], [error])]
    shape = graph.initializers[layer.weight].dims
    if layer.op == "MatMul":  # of any rank, channels last
        rows = f"{corrected}/rows"
        constants[rows] = numpy_helper.from_array(np.array([-1, shape[layer.axis]]), rows)
        nodes.append(helper.make_node("Reshape", [error, rows], [f"{error}/rows"]))
        error = f"{error}/rows"
    axes = [0, *range(2, len(shape))] if layer.op == "Conv" else [0]
    constants[f"{corrected}/axes"] = numpy_helper.from_array(np.array(axes), f"{corrected}/axes")
    return [
        *nodes,
        helper.make_node("ReduceMean", [error, f"{corrected}/axes"], [shift], keepdims=1),
        helper.make_node("Add", [raw, shift], [corrected]),
    ]


def _model_of(
    model: ModelProto, nodes: list[NodeProto], constants: Mapping[str, TensorProto], outputs: list[str]
) -> ModelProto:
    """A model with the inputs of `model` and these outputs, of the nodes that the outputs need."""
    result = copy_without(model, "node", "initializer", "output")
    graph = result.graph
    graph.node.extend(nodes)
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    prune(result)
    read = {name for node in graph.node for name in (*node.input, *captured(node))}
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)
    return result
