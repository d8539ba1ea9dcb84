"""Rewrite an external ONNX graph into the float graph of a bundle.

One image of one size, float32, opset 19, sizes folded; scales folded into convolutions; inputs and outputs of a bundle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.importing.io_contract import GraphInputs, dtype_of
from edgedetr.importing.output_formats import BoxFormat
from edgedetr.importing.output_tracing import TensorSlice
from edgedetr.onnx_graph.fold import fold_at_fixed_size
from edgedetr.onnx_graph.fp32 import convert_to_fp32
from edgedetr.onnx_graph.graph_builder import GraphBuilder
from edgedetr.onnx_graph.graph_edit import rename_tensors
from edgedetr.onnx_graph.index import GraphIndex, display_name
from edgedetr.onnx_graph.opset import OPSET, convert_opset
from edgedetr.quantization.policy import role_from_name, set_role

# What no version of TensorRT runs, and why; what the input's size decides has been folded before.
_REFUSED = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "control flow that the input's size does not decide"),
    **dict.fromkeys(
        (
            "SequenceConstruct",
            "SequenceAt",
            "SequenceInsert",
            "SequenceErase",
            "SequenceEmpty",
            "SequenceLength",
            "SplitToSequence",
            "ConcatFromSequence",
            "Optional",
            "OptionalGetElement",
            "OptionalHasElement",
        ),
        "lists of tensors",
    ),
    **dict.fromkeys(
        ("StringNormalizer", "StringSplit", "StringConcat", "RegexFullMatch", "TfIdfVectorizer", "LabelEncoder"), "text"
    ),
}


@dataclass(frozen=True)
class NormalizedGraph:
    """The graph for one image of one size, its index, and whether the file computes in float16."""

    model: ModelProto
    index: GraphIndex
    is_fp16: bool


def normalize(source_model: ModelProto, inputs: GraphInputs, height: int, width: int) -> NormalizedGraph:
    """The file's graph for one image of height x width, in float32 and opset 19, without control flow.

    Errors: ExportError where the graph does not run at that size, or needs what TensorRT does not run.
    """
    model = ModelProto()
    model.CopyFrom(source_model)
    sizes = {inputs.image: [1, 3, height, width], **({inputs.sizes: [1, 2]} if inputs.sizes else {})}
    masks = {inputs.mask: np.ones((1, height, width), dtype_of(source_model, inputs.mask))} if inputs.mask else {}
    fix_inputs(model, sizes, masks)
    is_fp16 = convert_to_fp32(model)
    model = fold_at_fixed_size(convert_opset(model, OPSET))
    name_nodes(model)
    for node in model.graph.node:
        if node.op_type in _REFUSED:
            raise ExportError(
                f"{display_name(node)} is {node.op_type}: {_REFUSED[node.op_type]}, which TensorRT does not "
                "run; export the model with a fixed size and without its post-processing"
            )
    graph = GraphIndex(model)
    if graph.inference_error:
        raise ExportError(
            f"sizes cannot be inferred for a {height} x {width} image ({graph.inference_error}); expected a model "
            "that takes this size; give another by --input HxW"
        )
    text = next((name for name, kind in graph.types.items() if kind == TensorProto.STRING), None)
    if text is not None:
        raise ExportError(
            f"tensor {text!r} holds text, which TensorRT does not run; export the model without its post-processing"
        )
    return NormalizedGraph(model, graph, is_fp16)


CONTRACT_NAMES = ("images", "logits", "boxes")  # names of a bundle's inputs and outputs


def fix_inputs(model: ModelProto, sizes: Mapping[str, Sequence[int]], constants: Mapping[str, np.ndarray]) -> None:
    """Set the sizes of inputs, and replace other inputs by constants. Shapes of inner tensors are removed."""
    graph = model.graph
    kept = [item for item in graph.input if item.name in sizes]
    for item in kept:
        shape = item.type.tensor_type.shape
        del shape.dim[:]
        for size in sizes[item.name]:
            shape.dim.add(dim_value=size)
    copies = [onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in kept]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(copies)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    for item in graph.output:  # inferred again from the inputs
        item.type.tensor_type.ClearField("shape")


def name_nodes(model: ModelProto) -> None:
    """Give every node a unique name: policies and profiles refer to nodes by name."""
    seen: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{number}"
        seen.add(node.name)


@dataclass(frozen=True)
class _Scaling:
    """A node that multiplies the output of a Conv by `factor` [O] and adds `summand` [O], per channel."""

    conv: NodeProto
    node: NodeProto
    factor: np.ndarray
    summand: np.ndarray


def fold_scales(model: ModelProto) -> int:
    """Fold BatchNormalization, and Mul and Add per channel, into the Conv before them; return how many were folded.

    Otherwise they would stay outside of the quantized weights, between the convolution and its activation.
    """
    done = 0
    while True:
        graph = GraphIndex(model)
        found = {item.conv.name: item for node in graph.nodes if (item := _scaling(graph, node)) is not None}
        for item in found.values():
            _fold_into_conv(model, graph, item)
        if not found:
            return done
        done += len(found)


def _scaling(graph: GraphIndex, node: NodeProto) -> _Scaling | None:
    """The scaling by constants that a node applies to a Conv of which it is the only consumer; None for other nodes."""
    if node.op_type not in ("BatchNormalization", "Mul", "Add"):
        return None
    for index in range(1 if node.op_type == "BatchNormalization" else 2):
        conv = graph.producers.get(node.input[index])
        if conv is None or conv.op_type != "Conv" or conv.output[0] in graph.outputs:
            continue
        rest = [*conv.input[1:], *node.input[:index], *node.input[index + 1 :]]
        if not all(name in graph.constants for name in rest if name) or len(graph.consumers[conv.output[0]]) > 1:
            continue
        channels = graph.constants[conv.input[1]].dims[0]
        if node.op_type == "BatchNormalization":
            gain, shift, mean, variance = (graph.constant(name).astype(np.float64) for name in node.input[1:5])
            epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
            factor = gain / np.sqrt(variance + epsilon)
            return _Scaling(conv, node, factor, shift - mean * factor)
        value = _per_channel(graph.constant(node.input[1 - index]).astype(np.float64), channels)
        if value is not None:
            multiplies = node.op_type == "Mul"
            return _Scaling(
                conv, node, value if multiplies else np.ones(channels), np.zeros(channels) if multiplies else value
            )
    return None


def _per_channel(value: np.ndarray, channels: int) -> np.ndarray | None:
    """A constant that is one number, or one per channel of a feature map, as [channels]; None for any other shape."""
    shape = list(value.shape)
    per_channel = len(shape) in (3, 4) and shape[-3:] == [channels, 1, 1] and (len(shape) == 3 or shape[0] == 1)
    return np.broadcast_to(value.reshape(-1), (channels,)) if value.size == 1 or per_channel else None


def _fold_into_conv(model: ModelProto, graph: GraphIndex, item: _Scaling) -> None:
    conv = item.conv
    weight = graph.constant(conv.input[1]).astype(np.float64)
    biased = len(conv.input) > 2 and bool(conv.input[2])
    bias = graph.constant(conv.input[2]).astype(np.float64) if biased else np.zeros(len(weight))
    # In float64: rounding of the fold would stay in the weights.
    folded = {
        f"{conv.name}.weight": weight * item.factor[:, None, None, None],
        f"{conv.name}.bias": bias * item.factor + item.summand,
    }
    for old in [tensor for tensor in model.graph.initializer if tensor.name in folded]:
        model.graph.initializer.remove(old)
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in folded.items()
    )
    data = conv.input[0]
    del conv.input[:]
    conv.input.extend([data, *folded])
    conv.output[0] = item.node.output[0]
    model.graph.node.remove(item.node)


@dataclass(frozen=True)
class ContractOutputs:
    """Where a bundle's outputs are in the graph.

    logits, boxes   of all `queries`; `width` logits each
    box_format      of `boxes`; a bundle's are cx, cy, w, h in fractions of the image
    columns         indices of the logits to keep, in this order
    """

    logits: TensorSlice
    boxes: TensorSlice
    box_format: BoxFormat
    queries: int
    width: int
    columns: tuple[int, ...]


def attach_contract(
    model: ModelProto, image: str, outputs: ContractOutputs, *, scale: np.ndarray, shift: np.ndarray
) -> ModelProto:
    """Inputs and outputs of a bundle around the graph: `images` 0..255 -> normalization -> graph -> `logits`, `boxes`.

    image          name of the graph's input
    scale, shift   [3]   the graph takes images * scale + shift, per RGB channel
    """
    result = ModelProto()
    result.CopyFrom(model)
    _rename(result, {name: f"{name}/inner" for name in CONTRACT_NAMES})
    image = _inner_name(image)
    graph = result.graph
    size = [dim.dim_value for item in graph.input if item.name == image for dim in item.type.tensor_type.shape.dim]
    front, normalized = GraphBuilder("/normalize"), "images"
    for kind, value in (("Mul", scale), ("Add", shift)):
        if not np.all(value == (1 if kind == "Mul" else 0)):
            normalized = front.add(kind, normalized, front.constant(value.reshape(3, 1, 1), np.float32))
    for node in graph.node:
        rename_tensors(node, {image: normalized})
    classes, boxes, queries = GraphBuilder("/logits"), GraphBuilder("/boxes"), outputs.queries
    logits = _to_rows(classes, outputs.logits, queries, outputs.width)
    if list(outputs.columns) == list(range(outputs.width)):
        classes.add("Identity", logits, output="logits")
    else:
        classes.add("Gather", logits, classes.constant(list(outputs.columns)), output="logits", axis=2)
    rows = _to_rows(boxes, outputs.boxes, queries, 4)
    boxes.add("Identity", _to_cxcywh(boxes, rows, outputs.box_format), output="boxes")
    nodes = [
        NodeProto.FromString(node.SerializeToString())
        for node in [*front.nodes, *graph.node, *classes.nodes, *boxes.nodes]
    ]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*front.constants, *classes.constants, *boxes.constants])
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, size))
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, queries, last])
        for name, last in (("logits", len(outputs.columns)), ("boxes", 4))
    )
    return result


def _inner_name(name: str) -> str:
    return f"{name}/inner" if name in CONTRACT_NAMES else name


def _to_rows(builder: GraphBuilder, rows: TensorSlice, queries: int, width: int) -> str:
    """The slice as [1, queries, width]. Folding removes a Reshape that changes nothing."""
    name = _inner_name(rows.tensor)
    if rows.transposed or rows.columns:
        shape = [1, -1, queries] if rows.transposed else [1, queries, -1]
        name = builder.add("Reshape", name, builder.constant(shape))
    if rows.transposed:
        name = builder.add("Transpose", name, perm=[0, 2, 1])
    if rows.columns:
        first, last = rows.columns
        return builder.add("Slice", name, builder.constant([first]), builder.constant([last]), builder.constant([2]))
    return builder.add("Reshape", name, builder.constant([1, queries, width]))


def _to_cxcywh(builder: GraphBuilder, boxes: str, box_format: BoxFormat) -> str:
    """Boxes [1, N, 4] as cx, cy, w, h in fractions of the image.

    Element by element, because GPUs may round a matrix product to TF32.
    """
    if box_format.unit != (1.0, 1.0):
        boxes = builder.add("Mul", boxes, builder.constant(1 / np.array(box_format.unit * 2), np.float32))
    if box_format.layout == "cxcywh":
        return boxes
    first, second = builder.add_many("Split", boxes, builder.constant([2, 2]), outputs=("", ""), axis=2)
    size = second if box_format.layout == "xywh" else builder.add("Sub", second, first)
    center = builder.add("Add", first, builder.add("Mul", size, builder.constant(0.5, np.float32)))
    return builder.add("Concat", center, size, axis=2)


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    for node in model.graph.node:
        rename_tensors(node, names)
    for item in [*model.graph.initializer, *model.graph.input, *model.graph.output]:
        item.name = names.get(item.name, item.name)


_PARTS = ("memory_projection", "dynamic_head")  # roles of layers inside a decoder or a selection
_GATHERS = ("Gather", "GatherElements", "GatherND")


def annotate_nodes(model: ModelProto, queries: int) -> dict[str, int]:
    """Write into each node's metadata the role that it has for quantization policies; return how often each occurs.

    decoder           the output has one row per query. An image feature with the same number of tokens counts as well
    query_selection   every path to an output of the graph goes through a TopK, or a Gather at the indices of a TopK

    A name that shows a role, as in our own exports, counts if the graph shows none, or if its role is a part of these.
    """
    graph = GraphIndex(model)
    selecting = _selecting_nodes(graph)
    reaching = _reaching_an_output(graph, selecting)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        role = role_from_name(node.name)
        if role not in _PARTS:
            if any(_has_rows(graph, name, queries) for name in node.output):
                role = "decoder"
            elif selecting and node.name not in reaching:
                role = "query_selection"
        set_role(node, role)
        if role:
            counts[role] += 1
    return dict(counts)


def _has_rows(graph: GraphIndex, name: str, queries: int) -> bool:
    shape = graph.shape(name)
    return shape is not None and 2 <= len(shape) <= 3 and shape[-2] == queries


def _selecting_nodes(graph: GraphIndex) -> set[str]:
    """Names of the TopK nodes, and of the Gathers that read at the indices which they give."""
    selecting: set[str] = set()
    indices: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "TopK":
            selecting.add(node.name)
            indices.add(node.output[1])
        elif node.op_type in _GATHERS and len(node.input) > 1 and node.input[1] in indices:
            selecting.add(node.name)
        elif any(name in indices for name in node.input):
            indices.update(node.output)  # arithmetic on indices: repeated, divided, with the batch before them
    return selecting


def _reaching_an_output(graph: GraphIndex, blocked: set[str]) -> set[str]:
    """Names of the nodes from which a path leads to an output of the graph without passing a blocked node."""
    reached: set[str] = set()
    waiting: list[NodeProto] = [graph.producers[name] for name in graph.outputs if name in graph.producers]
    while waiting:
        node = waiting.pop()
        if node.name in reached or node.name in blocked:
            continue
        reached.add(node.name)
        waiting.extend(graph.producers[name] for name in node.input if name in graph.producers)
    return reached
