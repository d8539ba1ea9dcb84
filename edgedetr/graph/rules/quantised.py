"""Q/DQ pairs: what TensorRT's explicit quantisation accepts, and what it accepts and runs slower than without."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from edgedetr.graph.finding import Fault, Target, at
from edgedetr.graph.view import GraphView, attribute, type_name

PAIR = ("QuantizeLinear", "DequantizeLinear")
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)     # 6.1e-5; below it a scale loses its digits
SMALLEST_SIDE = 16              # inputs or outputs of a product
AGAIN = "quantise the float model again: edgedetr export B --int8"


def zero_point(view: GraphView, target: Target) -> Iterator[Fault]:
    """int8, all zeros, constant, as many as there are scales."""
    for node in _pairs(view):
        if len(node.input) < 3 or not node.input[2]:
            yield at(node, "no zero point, which ONNX reads as uint8 0", f"write an int8 zero point of 0; {AGAIN}")
            continue
        zero, scale = view.value(node.input[2]), view.value(node.input[1])
        if zero is None:
            yield at(node, "the zero point is no constant", AGAIN)
        elif zero.dtype != np.int8:
            yield at(node, f"the zero point is {zero.dtype}, so the tensor is; TensorRT has signed int8 alone "
                     "(it takes uint8 for it in silence, and a bias stays float)", AGAIN)
        elif zero.any():
            largest = zero.reshape(-1)[np.abs(zero.astype(np.int64)).argmax()]
            yield at(node, f"the zero point is {largest}; expected 0 (symmetric)", AGAIN)
        elif scale is not None and zero.size != scale.size:
            yield at(node, f"{zero.size} zero points for {scale.size} scales", AGAIN)


def scale_value(view: GraphView, target: Target) -> Iterator[Fault]:
    """Constant, finite, positive; as FP16 not below its smallest normal number."""
    for node in _pairs(view):
        scale = view.value(node.input[1])
        if scale is None:
            yield at(node, "the scale is computed; expected a constant", AGAIN)
        elif not np.isfinite(scale).all() or (scale <= 0).any():
            yield at(node, f"the scale is {scale.min() if np.isfinite(scale).all() else 'not finite'}; "
                     "expected positive numbers", f"calibrate again on real pictures; {AGAIN}")
        elif scale.dtype == np.float16 and float(scale.min()) < SMALLEST_HALF:
            yield at(node, f"the smallest scale is {float(scale.min()):.1e} in FP16, below its smallest normal number, "
                     f"{SMALLEST_HALF:.1e}", f"raise it to {SMALLEST_HALF:.1e} before it is cast; {AGAIN}")
        elif scale.dtype not in (np.float32, np.float16):
            yield at(node, f"the scale is {scale.dtype}; expected float32 or float16", AGAIN)


def scale_type(view: GraphView, target: Target) -> Iterator[Fault]:
    """The type of the tensor that is quantised; TensorRT 11 allows float32 scales of FP16 tensors."""
    for node in _pairs(view):
        if node.op_type != "QuantizeLinear":
            continue
        tensor, scale = view.types.get(node.input[0]), view.types.get(node.input[1])
        if tensor is None or scale is None or tensor == scale:
            continue
        wide = scale == TensorProto.FLOAT and target.tensorrt >= (11, 0)
        yield at(node, f"a {type_name(tensor)} tensor has a {type_name(scale)} scale",
                 "write the scale in the tensor's own type", "warning" if wide else "error")


def per_channel_activation(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in _pairs(view):
        scale, source = view.constants.get(node.input[1]), node.input[0]
        if scale is None or int(np.prod(scale.dims)) <= 1 or source in view.constants:
            continue
        if node.op_type == "DequantizeLinear" and source in view.makers:
            continue            # its QuantizeLinear is told
        yield at(node, f"an activation has {int(np.prod(scale.dims))} scales; expected one in all", AGAIN)


def weight_axis(view: GraphView, target: Target) -> Iterator[Fault]:
    """Scales of a weight run along its output channels."""
    for node in view.nodes:
        if node.op_type not in WEIGHTED:
            continue
        restore = view.dequantised(node, 1)
        scale = view.value(restore.input[1]) if restore is not None else None
        if restore is None or scale is None or scale.size <= 1:
            continue
        shape = view.shape(restore.output[0]) or view.shape(restore.input[0])
        if shape is None:
            continue
        if attribute(restore, "block_size", 0):
            yield at(restore, "scales per block", f"one scale per output channel; {AGAIN}")
            continue
        found, wanted = attribute(restore, "axis", 1) % len(shape), _output_axis(view, node, restore, len(shape))
        if found != wanted:
            yield at(restore, f"scales along axis {found} of the weight of {node.op_type} {node.name}; its output "
                     f"channels are axis {wanted}", AGAIN)
        elif shape[found] not in (None, scale.size):
            yield at(restore, f"{scale.size} scales for {shape[found]} output channels", AGAIN)


def one_side_quantised(view: GraphView, target: Target) -> Iterator[Fault]:
    """A product runs on integers when its data and its weight both come through Q/DQ."""
    for node in view.nodes:
        if node.op_type not in WEIGHTED:
            continue
        sides = [view.dequantised(node, index) is not None for index in (0, 1)]
        if any(sides) and not all(sides):
            yield at(node, f"only the {'data' if sides[0] else 'weight'} of this {node.op_type} is quantised, so it "
                     "runs in float with a conversion more", f"quantise both or neither; {AGAIN}", "warning")


def small_product(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.nodes:
        if node.op_type not in ("MatMul", "Gemm") or not (view.dequantised(node, 0) and view.dequantised(node, 1)):
            continue
        shape = view.shape(node.input[1])
        sides = [size for size in (shape or [])[-2:] if size is not None]
        if len(shape or []) >= 2 and sides and min(sides) < SMALLEST_SIDE:
            yield at(node, f"an INT8 product of {' x '.join(str(size) for size in sides)}; below {SMALLEST_SIDE} "
                     "inputs or outputs it is slower than FP16", "leave it float (a policy's [[float]] rule)",
                     "warning")


def before_relu(view: GraphView, target: Target) -> Iterator[Fault]:
    """Conv and Relu are one kernel only when nothing stands between them."""
    for node in view.nodes:
        maker = view.makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if maker is None or maker.op_type not in ("Conv", "ConvTranspose"):
            continue
        restored = [reader.node.output[0] for reader in view.readers[node.output[0]]]
        # A Relu that reads the Conv itself, beside the pair, is another branch: both values are needed.
        if any(reader.node.op_type in ("Relu", "Clip") for name in restored for reader in view.readers[name]):
            yield at(node, f"stands between {maker.op_type} {maker.name} and its Relu, so that they are two kernels",
                     f"quantise behind the Relu; {AGAIN}", "warning")


def concat_scales(view: GraphView, target: Target) -> Iterator[Fault]:
    """A Concat whose output is quantised runs on integers when its inputs share one scale."""
    for node in view.nodes:
        if node.op_type != "Concat":
            continue
        makers = [view.makers.get(name) for name in node.input]
        scales = [view.value(m.input[1]) for m in makers if m is not None and m.op_type == "DequantizeLinear"]
        known = {float(scale) for scale in scales if scale is not None and scale.size == 1}
        requantised = any(reader.node.op_type == "QuantizeLinear" for reader in view.readers[node.output[0]])
        if len(scales) == len(makers) and len(known) > 1 and requantised:
            yield at(node, f"its {len(makers)} inputs have {len(known)} scales, so each is converted once more",
                     "give them one scale, the largest", "warning")


def transposed_convolution(view: GraphView, target: Target) -> Iterator[Fault]:
    for node in view.nodes:
        restore = view.dequantised(node, 1) if node.op_type == "ConvTranspose" else None
        scale = view.constants.get(restore.input[1]) if restore is not None else None
        if scale is not None and int(np.prod(scale.dims)) > 1:
            yield at(node, "an INT8 ConvTranspose with a scale per channel has been without any kernel",
                     "one scale for its weight, or leave it float", "warning")


def _pairs(view: GraphView) -> Iterator[NodeProto]:
    return (node for node in view.nodes if node.op_type in PAIR)


def _output_axis(view: GraphView, node: NodeProto, restore: NodeProto, rank: int) -> int:
    """Axis of the output channels in the weight as it is stored."""
    if node.op_type == "Conv":
        axis = 0
    elif node.op_type == "Gemm":
        axis = 0 if attribute(node, "transB", 0) else 1
    else:
        axis = 1 if node.op_type == "ConvTranspose" else rank - 1
    between = view.makers[node.input[1]]
    if between is restore:
        return axis
    order = next((list(item.ints) for item in between.attribute if item.name == "perm"), list(range(rank))[::-1])
    return int(order[axis])
