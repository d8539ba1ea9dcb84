"""Bias correction: what rounding shifts the mean output of each INT8 layer by is put back into the layer's bias.

Nagel et al. 2019, "Data-Free Quantization", section 4.2, in its empirical form: per output channel, the mean over
images of W x - W_q x_q, where x_q comes from the layers before, which have been corrected. The weights of one channel
are too few for their rounding errors to cancel, and where the input is never negative what is left shifts the mean.

Layer after layer would take as many passes over the images as there are layers. Here the layers are taken in a few
parts: within a part each image's own mean error stands for the mean error over all of them, which is known only after
the pass; the layers of earlier parts have their final biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import Layer, Plan
from edgedetr.runtime.backends.onnxruntime import plain_session

PICTURES = 64  # at most; of the demonstration's 96, 32 leave twice the error in the means that all leave
PARTS = 4  # passes over them, each over the layers up to its own
TWIN = "int8/"  # before the names of the tensors of the quantized half


def bias_of(layer: Layer, graph: GraphIndex) -> tuple[NodeProto, int] | None:
    """The node that adds a layer's bias and the input it is at; None where the layer's bias cannot take a shift.

    A convolution or Gemm without a bias gets one, at input 2: kernels add it for nothing. A matrix product without an
    Add of its own behind it would need a node more, and is left alone.
    """
    node = graph.node_by_name[layer.node]
    channels = graph.initializers[layer.weight].dims[layer.axis]
    if layer.op == "MatMul":
        node = graph.only_consumer(node.output[0]) or node
        if node.op_type != "Add":
            return None
        index = 1 if node.input[1] in graph.initializers else 0
    else:
        scaled = next((item.f for item in node.attribute if item.name == "beta"), 1.0)
        if layer.op == "Gemm" and scaled != 1.0:
            return None
        index = 2
    name = node.input[index] if len(node.input) > index else ""
    if not name:
        return node, index
    constant = graph.initializers.get(name)
    fits = constant is not None and constant.dims and constant.dims[-1] == channels == int(np.prod(constant.dims))
    return (node, index) if fits else None


def shifts(
    model: ModelProto,
    quantized: ModelProto,
    plan: Plan,
    batches: Callable[[], Iterable[np.ndarray]],
    parts: int = PARTS,
) -> dict[str, np.ndarray]:
    """{name of a layer's node: [O] float32, what has to be added to its bias}, for every layer that has a place for it.

    model       the float graph
    quantized   the same with Q/DQ pairs, in float32, biases as they were
    batches     gives the images as the graph takes them, [1, 3, H, W] float32, once for each part
    parts       more are more exact, up to the number of layers

    Both graphs run as one, one image at a time: behind each layer of the quantized half the mean of every channel is
    set right before the layers that follow read it, so that a layer's shift does not count those of the layers before
    it once more. Memory: the activations of one image and [O] numbers per layer.
    """
    graph = GraphIndex(model)
    layers = [layer for layer in plan.layers if bias_of(layer, graph) is not None]
    found: dict[str, np.ndarray] = {}
    for part in np.array_split(np.arange(len(layers)), min(parts, len(layers))):
        found |= _means(*_joint(model, quantized, [layers[i] for i in part], found), batches())
    return found


def _means(joint: ModelProto, wanted: dict[str, str], batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """{name: [O], mean over the images of the output that is wanted for it}."""
    session = _session(joint)
    sums = {name: np.zeros(0) for name in wanted}
    count = 0
    for batch in batches:
        for name, value in zip(wanted, session.run(list(wanted.values()), {"images": batch})):
            flat = value.reshape(-1).astype(np.float64)
            sums[name] = sums[name] + flat if count else flat
        count += 1
    return {name: (total / count).astype(np.float32) for name, total in sums.items()}


def _joint(
    model: ModelProto, quantized: ModelProto, part: Sequence[Layer], known: Mapping[str, np.ndarray]
) -> tuple[ModelProto, dict[str, str]]:
    """Float and quantized graph in one, and {layer's node: the output that says its shift} for a part of the layers.

    known   shifts of the layers before them
    """
    graph = GraphIndex(model)
    layers = {layer.node: layer for layer in part}
    made = {name for node in quantized.graph.node for name in node.output}
    constants = {item.name: item for item in (*model.graph.initializer, *quantized.graph.initializer)}
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    wanted: dict[str, str] = {}
    for source in quantized.graph.node:
        node = NodeProto.FromString(source.SerializeToString())
        node.name = TWIN + source.name
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = TWIN + name if name in made else name
        nodes.append(node)
        layer, right = layers.get(source.name), node.output[0]
        if layer is not None:
            node.output[0], wanted[layer.node] = f"{right}/raw", f"{right}/shift"
            nodes += _set_right(source.output[0], right, layer, graph, constants)
        elif source.name in known:
            node.output[0] = f"{right}/raw"
            places = (
                len(graph.initializers[graph.node_by_name[source.name].input[1]].dims) - 2
            )  # 2 behind a convolution's
            shift = known[source.name].reshape(-1, *[1] * places)
            constants[f"{right}/shift"] = numpy_helper.from_array(shift, f"{right}/shift")
            nodes.append(helper.make_node("Add", [f"{right}/raw", f"{right}/shift"], [right]))
    return _only(model, nodes, constants, list(wanted.values())), wanted


def _set_right(
    exact: str, right: str, layer: Layer, graph: GraphIndex, constants: dict[str, TensorProto]
) -> list[NodeProto]:
    """`right` = raw + shift; shift is the mean of exact - raw over all but the channels, [1, O, 1, 1] or [1, O]."""
    raw, error, shift = (f"{right}/{word}" for word in ("raw", "error", "shift"))
    nodes = [helper.make_node("Sub", [exact, raw], [error])]
    shape = graph.initializers[layer.weight].dims
    if layer.op == "MatMul":  # of any rank, channels last
        constants[f"{right}/rows"] = numpy_helper.from_array(np.array([-1, shape[layer.axis]]), f"{right}/rows")
        nodes.append(helper.make_node("Reshape", [error, f"{right}/rows"], [f"{error}/rows"]))
        error = f"{error}/rows"
    axes = [0, *range(2, len(shape))] if layer.op == "Conv" else [0]
    constants[f"{right}/axes"] = numpy_helper.from_array(np.array(axes), f"{right}/axes")
    return [
        *nodes,
        helper.make_node("ReduceMean", [error, f"{right}/axes"], [shift], keepdims=1),
        helper.make_node("Add", [raw, shift], [right]),
    ]


def _only(
    model: ModelProto, nodes: list[NodeProto], constants: dict[str, TensorProto], outputs: list[str]
) -> ModelProto:
    """A model of the nodes that these outputs need."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:], graph.output[:]
    graph.node.extend(kept[::-1])
    graph.initializer.extend(item for name, item in constants.items() if name in needed)
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return result


def _session(model: ModelProto) -> Any:
    """Without optimizations: Q/DQ in float arithmetic, what the graph means, on every CPU."""
    return plain_session(model.SerializeToString(), error=ExportError)
