"""Q/DQ pairs that TensorRT's explicit quantization refuses, or accepts and runs slower than float."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.hardware_limits import SMALLEST_FP16, SMALLEST_INT8_CHANNELS, SMALLEST_INT8_PRODUCT, is_narrow
from edgedetr.onnx_graph.index import FLOATS, GraphIndex, int_attribute, ints_attribute, type_name

PAIR = ("QuantizeLinear", "DequantizeLinear")
# Types that a quantized tensor may have.
SIGNED = {
    TensorProto.INT8,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.INT4,
    getattr(TensorProto, "FLOAT4E2M1", TensorProto.INT8),
}
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
AGAIN = "quantize the float model again: edgedetr export B --int8"


def zero_point(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Constant zeros of a signed type, as many as there are scales; may be absent where the type is known."""
    for node in _pairs(graph):
        if node.op_type == "QuantizeLinear":
            made = _quantized_type(graph, node)
            if made not in SIGNED:
                how = (
                    "no zero point and no output_dtype, which means uint8 0 in ONNX"
                    if len(node.input) < 3 and not (int_attribute(node, "output_dtype", 0))
                    else f"quantized to {type_name(made)}"
                )
                yield node_issue(
                    node,
                    f"{how}; TensorRT supports signed types only (it silently reads uint8 0 as int8)",
                    f"write an int8 zero point of 0; {AGAIN}",
                )
        name = node.input[2] if len(node.input) > 2 else ""
        zero, scale = graph.folded(name) if name else None, graph.folded(node.input[1])
        if name and zero is None:
            # Another rule reports a damaged one; that of FP8 is not checked.
            if name not in graph.constants and graph.types.get(name) != TensorProto.FLOAT8E4M3FN:
                yield node_issue(node, "the zero point is computed; expected a constant", AGAIN)
        elif zero is not None and np.asarray(zero, np.float32).any():
            largest = zero.reshape(-1)[np.abs(zero.astype(np.float32)).argmax()]
            yield node_issue(node, f"the zero point is {largest}; expected 0 (symmetric)", AGAIN)
        elif zero is not None and scale is not None and zero.size != scale.size:
            yield node_issue(node, f"{zero.size} zero points for {scale.size} scales", AGAIN)


def _quantized_type(graph: GraphIndex, node: NodeProto) -> int:
    """The output type of a QuantizeLinear, uint8 by default."""
    kind = int_attribute(node, "output_dtype", 0)
    if len(node.input) > 2 and node.input[2]:
        kind = graph.types.get(node.input[2], kind or TensorProto.INT8)
    return kind or TensorProto.UINT8


def scale_value(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Constant, finite and positive; in FP16 at least its smallest normal number."""
    for node in _pairs(graph):
        scale = graph.folded(node.input[1])
        if scale is None:
            # TensorRT 11 accepts computed scales.
            if target.tensorrt < (11, 0) and node.input[1] not in graph.constants:
                yield node_issue(node, "the scale is computed; expected a constant", AGAIN)
        elif not np.isfinite(scale).all() or (scale <= 0).any():
            yield node_issue(
                node,
                f"the scale is {scale.min() if np.isfinite(scale).all() else 'not finite'}; expected positive numbers",
                f"calibrate again on real images; {AGAIN}",
            )
        elif scale.dtype == np.float16 and float(scale.min()) < SMALLEST_FP16:
            yield node_issue(
                node,
                f"the smallest scale is {float(scale.min()):.1e} in FP16, below its smallest normal number, "
                f"{SMALLEST_FP16:.1e}",
                f"raise it to {SMALLEST_FP16:.1e} before it is cast; {AGAIN}",
            )
        elif scale.dtype == np.float64:
            yield node_issue(node, "the scale is float64; expected the type of the tensor", AGAIN, "warning")
        elif graph.types.get(node.input[1]) not in FLOATS:
            yield node_issue(node, f"the scale is {scale.dtype}; expected float32 or float16", AGAIN)


def scale_type(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """The scale has the type of the quantized tensor; TensorRT 11 allows others."""
    for node in _pairs(graph):
        if node.op_type != "QuantizeLinear":
            continue
        tensor, scale = graph.types.get(node.input[0]), graph.types.get(node.input[1])
        if tensor is None or scale is None or tensor == scale or TensorProto.DOUBLE in (tensor, scale):
            continue
        yield node_issue(
            node,
            f"a {type_name(tensor)} tensor has a {type_name(scale)} scale",
            "store the scale in the tensor's own type",
            "warning" if target.tensorrt >= (11, 0) else "error",
        )


def scale_axis(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """The axis of the scales exists, and its size is their number."""
    for node in _pairs(graph):
        scale, shape = graph.folded(node.input[1]), graph.shape(node.input[0])
        if scale is None or scale.size <= 1 or shape is None or int_attribute(node, "block_size", 0):
            continue
        axis = int_attribute(node, "axis", 1)
        if not -len(shape) <= axis < len(shape):
            yield node_issue(node, f"scales along axis {axis} of a tensor of {len(shape)} dimensions", AGAIN)
        elif shape[axis] not in (None, scale.size):
            yield node_issue(node, f"{scale.size} scales along axis {axis}, which is {shape[axis]} long", AGAIN)


def per_channel_activation(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in _pairs(graph):
        scale, source = graph.folded(node.input[1]), node.input[0]
        if scale is None or scale.size <= 1 or source in graph.constants or graph.folded(source) is not None:
            continue
        if int_attribute(node, "block_size", 0):
            continue
        if node.op_type == "DequantizeLinear" and source in graph.producers:
            continue  # reported at its QuantizeLinear
        yield node_issue(node, f"an activation has {scale.size} scales; expected a single one", AGAIN)


def weight_axis(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Scales of a weight are along its output channels; TensorRT 11 accepts others, but multiplies in float."""
    for node in graph.nodes:
        restore = graph.dequantizer(node, 1) if node.op_type in WEIGHTED else None
        scale = graph.folded(restore.input[1]) if restore is not None else None
        if restore is None or scale is None or scale.size <= 1:
            continue
        shape = graph.shape(restore.output[0]) or graph.shape(restore.input[0])
        if not shape:
            continue
        if int_attribute(restore, "block_size", 0):
            if node.op_type in ("Conv", "ConvTranspose"):
                yield node_issue(
                    restore,
                    f"scales per block in the weight of a {node.op_type}",
                    f"one scale per output channel; {AGAIN}",
                )
            continue
        found, wanted = int_attribute(restore, "axis", 1) % len(shape), _output_axis(graph, node, restore, len(shape))
        if found != wanted:
            yield node_issue(
                restore,
                f"scales along axis {found} of the weight of {node.op_type} {node.name}; its output "
                f"channels are axis {wanted}",
                AGAIN,
                "warning" if target.tensorrt >= (11, 0) else "error",
            )


def one_side_quantized(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """A layer runs on integers when its data and its weight both come from Q/DQ."""
    for node in graph.nodes:
        if node.op_type not in WEIGHTED:
            continue
        sides = [graph.dequantizer(node, index) is not None for index in (0, 1)]
        if any(sides) and not all(sides):
            yield node_issue(
                node,
                f"only the {'data' if sides[0] else 'weight'} of this {node.op_type} is quantized, so it "
                "runs in float with an additional conversion",
                f"quantize both or neither; {AGAIN}",
                "warning",
            )


def small_product(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.nodes:
        if node.op_type not in ("MatMul", "Gemm") or not (graph.dequantizer(node, 0) and graph.dequantizer(node, 1)):
            continue
        shape = graph.shape(node.input[1])
        sides = [size for size in (shape or [])[-2:] if size is not None]
        if len(shape or []) >= 2 and sides and min(sides) < SMALLEST_INT8_PRODUCT:
            yield node_issue(
                node,
                f"an INT8 product of {' x '.join(str(size) for size in sides)}; below {SMALLEST_INT8_PRODUCT} "
                "inputs or outputs it is slower than FP16",
                "leave it float (a policy's [[float]] rule)",
                "warning",
            )


def narrow_convolution(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """INT8 convolutions with 1, 2 or 4 channels on a side: slower than in float, and converted on the way in or out."""
    for node in graph.nodes:
        if node.op_type != "Conv" or not (graph.dequantizer(node, 0) and graph.dequantizer(node, 1)):
            continue
        shape = graph.shape(node.input[1])
        if shape is None or len(shape) < 3 or None in shape[:2] or int_attribute(node, "group", 1) != 1:
            continue
        outputs, inputs = int(shape[0] or 0), int(shape[1] or 0)
        if is_narrow(inputs, outputs):
            yield node_issue(
                node,
                f"an INT8 convolution from {inputs} to {outputs} channels; with fewer than {SMALLEST_INT8_CHANNELS} on "
                "a side, its kernel fills them up to 32",
                "leave it float (a policy's [[float]] rule)",
                "warning",
            )


def grouped_convolution(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.nodes:
        groups = int_attribute(node, "group", 1) if node.op_type == "Conv" else 1
        if groups > 1 and graph.dequantizer(node, 0) and graph.dequantizer(node, 1):
            yield node_issue(
                node,
                f"an INT8 convolution in {groups} groups; such ones have been slower than in FP16",
                "leave it float (a policy's [[float]] rule)",
                "warning",
            )


def before_relu(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """Conv and Relu are fused only when no node is between them."""
    for node in graph.nodes:
        layer = graph.producers.get(node.input[0]) if node.op_type == "QuantizeLinear" and node.input else None
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose"):
            continue
        dequantized = [name for made in node.output for other in graph.consumers[made] for name in other.node.output]
        # A Relu that reads the Conv's own output is another branch: both values are needed.
        if any(other.node.op_type in ("Relu", "Clip") for name in dequantized for other in graph.consumers[name]):
            yield node_issue(
                node,
                f"is between {layer.op_type} {layer.name} and its Relu, so that they are not fused",
                f"quantize after the Relu; {AGAIN}",
                "warning",
            )


def concat_scales(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """A Concat with a quantized output runs on integers when its inputs share one scale."""
    for node in graph.nodes:
        if node.op_type != "Concat":
            continue
        producers = [graph.producers.get(name) for name in node.input]
        scales = [
            graph.folded(producer.input[1])
            for producer in producers
            if producer is not None and producer.op_type == "DequantizeLinear" and len(producer.input) > 1
        ]
        known = {float(scale.reshape(-1)[0]) for scale in scales if scale is not None and scale.size == 1}
        requantized = any(
            other.node.op_type == "QuantizeLinear" for name in node.output for other in graph.consumers[name]
        )
        if len(scales) == len(producers) and len(known) > 1 and requantized:
            yield node_issue(
                node,
                f"its {len(producers)} inputs have {len(known)} scales, so each is converted again",
                "give them one scale, the largest",
                "warning",
            )


def transposed_convolution(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.nodes:
        restore = graph.dequantizer(node, 1) if node.op_type == "ConvTranspose" else None
        scale = graph.folded(restore.input[1]) if restore is not None else None
        if scale is not None and scale.size > 1:
            yield node_issue(
                node,
                "an INT8 ConvTranspose with a scale per channel had no kernel in some releases",
                "one scale for its weight, or leave it float",
                "warning",
            )


def half_quantized_attention(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """The two products of an attention, on either side of its Softmax, are both INT8 or both float."""
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        scores, sums = _product_before(graph, node), _product_after(graph, node)
        if scores is None or sums is None:
            continue
        integer = [bool(graph.dequantizer(one, 0) and graph.dequantizer(one, 1)) for one in (scores, sums)]
        if any(integer) and not all(integer):
            yield node_issue(
                node,
                f"the attention around it has one INT8 product, {(scores if integer[0] else sums).name}, and one float "
                "product, so that it is not fused",
                f"quantize both products or neither; {AGAIN}",
                "warning",
            )


ATTENTION_STEPS = 6  # at most between a product of attention and its Softmax: scale, mask, Q, DQ, casts


def _product_before(graph: GraphIndex, softmax: NodeProto) -> NodeProto | None:
    """The MatMul of two activations whose result reaches a Softmax through operators on each element."""
    node = softmax
    for _ in range(ATTENTION_STEPS):
        makers = [graph.producers[name] for name in node.input if name in graph.producers]
        if not makers:
            return None
        node = makers[0]
        if node.op_type == "MatMul":
            return node if _of_activations(graph, node) else None
        if node.op_type not in ("Mul", "Div", "Add", "Where", "Cast", *PAIR):
            return None
    return None


def _product_after(graph: GraphIndex, softmax: NodeProto) -> NodeProto | None:
    """The MatMul of two activations that reads a Softmax."""
    node = softmax
    for _ in range(ATTENTION_STEPS):
        reader = graph.only_consumer(node.output[0])
        if reader is None or reader.op_type == "MatMul":
            return reader if reader is not None and _of_activations(graph, reader) else None
        if reader.op_type not in ("Cast", "Identity", *PAIR):
            return None
        node = reader
    return None


def _of_activations(graph: GraphIndex, node: NodeProto) -> bool:
    """Whether neither factor is a weight, quantized or not."""
    restores = [graph.dequantizer(node, index) for index in (0, 1)]
    names = [restore.input[0] if restore else name for restore, name in zip(restores, node.input)]
    return all(name not in graph.constants for name in names)


def _pairs(graph: GraphIndex) -> Iterator[NodeProto]:
    """Q and DQ nodes with their scale and output; the inference rule reports incomplete ones."""
    return (node for node in graph.nodes if node.op_type in PAIR and len(node.input) > 1 and node.output)


def _output_axis(graph: GraphIndex, node: NodeProto, restore: NodeProto, rank: int) -> int:
    """Axis of the output channels in the weight as it is stored."""
    if node.op_type == "Conv":
        axis = 0
    elif node.op_type == "Gemm":
        axis = 0 if int_attribute(node, "transB", 0) else 1
    else:
        axis = 1 if node.op_type == "ConvTranspose" else rank - 1
    between = graph.producers[node.input[1]]
    if between is restore:
        return axis
    order = ints_attribute(between, "perm")
    return order[axis] if sorted(order) == list(range(rank)) else rank - 1 - axis
