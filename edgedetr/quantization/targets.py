"""Two ways to write the same quantized set: what TensorRT accepts, and what ONNX Runtime runs fast on a CPU.

Both are symmetric with scale amax / 127. TensorRT takes signed int8 with zero point 0 only, and under strong typing a
scale has the type of its tensor, which is FP16: there each scale is the next larger normal FP16 number. ONNX Runtime's
kernels want uint8 activations: a signed tensor is stored with zero point 128 and the same scale, a non-negative one
with zero point 0 and half the scale, which contains every level of the signed grid and those between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from edgedetr.artifacts import INT8, INT8_CPU
from edgedetr.onnx_graph.hardware_limits import SMALLEST_FP16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.options import one_of
from edgedetr.quantization.policy import Plan
from edgedetr.runtime.cpu import int8_saturates

# Far above float32's smallest normal number, also when two scales are multiplied; a tensor that is always 0 gets 1.
SMALLEST_SCALE = 1e-12


def step(amax: float) -> float:
    """Distance of two levels of the signed grid."""
    return max(amax / 127, SMALLEST_SCALE) if amax > 0 else 1.0


def half_steps(scale: np.ndarray) -> np.ndarray:
    """The smallest normal FP16 numbers that are at least these, as float32; larger by 1e-3 of themselves at most.

    Weights and activations are divided by the rounded step, so that nothing is lost when it is stored as FP16.
    """
    wanted = np.asarray(scale, dtype=np.float32)
    near = wanted.astype(np.float16)
    near = np.where(near.astype(np.float32) < wanted, np.nextafter(near, np.float16(np.inf)), near)
    return np.maximum(near.astype(np.float32), np.float32(SMALLEST_FP16))


@dataclass(frozen=True)
class Grid:
    """Levels of a tensor: (integer - zero_point) * scale."""

    scale: np.float32
    zero_point: np.generic  # np.int8 or np.uint8


@dataclass(frozen=True)
class Dialect:
    """file          name in the bundle
    unsigned      activations are uint8
    outputs       outputs of convolutions and of residual sums are quantized too, for every reader
    integer_bias  biases of convolutions are int32 in steps of input scale x weight scale
    deep_bias     biases of matrix products have the shape [1, 1, O]
    half          everything that is not INT8 is FP16, the scales too
    weight_bits   8, or 7 where products of two neighbors would saturate 16 bits (x86 without VNNI)
    """

    name: str
    file: str
    unsigned: bool
    outputs: bool
    integer_bias: bool
    deep_bias: bool
    half: bool = False
    weight_bits: int = 8

    def grid(self, amax: float, never_negative: bool) -> Grid:
        """Levels for a tensor with this largest magnitude."""
        scale = float(half_steps(np.float32(step(amax)))) if self.half else step(amax)
        if not self.unsigned:
            return Grid(np.float32(scale), np.int8(0))
        if never_negative:
            return Grid(np.float32(scale / 2), np.uint8(0))
        return Grid(np.float32(scale), np.uint8(128))


TENSORRT = Dialect(
    INT8.target, INT8.file, unsigned=False, outputs=False, integer_bias=False, deep_bias=False, half=True
)
CPU = Dialect(INT8_CPU.target, INT8_CPU.file, unsigned=True, outputs=True, integer_bias=True, deep_bias=True)


@dataclass
class Cut:
    """A tensor that gets Q/DQ. readers: (node name, input index) that read the result, or None for all of them."""

    tensor: str
    readers: set[tuple[str, int]] | None


def cuts(model: ModelProto, plan: Plan, dialect: Dialect) -> dict[str, Cut]:
    """Where this dialect puts Q/DQ pairs, by tensor."""
    graph = GraphIndex(model)
    found: dict[str, Cut] = {}

    def some(tensor: str, node: str, index: int) -> None:
        cut = found.setdefault(tensor, Cut(tensor, set()))
        if cut.readers is not None:
            cut.readers.add((node, index))

    for layer in plan.layers:
        some(layer.data, layer.node, 0)
    for item in plan.residuals:
        some(item.tensor, item.node, item.index)
    for node in model.graph.node:
        # A pool of integers is a fourth of the memory traffic, and exact: `tied` gives both sides one range.
        if node.op_type == "MaxPool" and node.output[0] in found:
            some(node.input[0], node.name, 0)
    if dialect.outputs:
        for tensor in _outputs(graph, plan):
            found[tensor] = Cut(tensor, None)
    return found


def _outputs(graph: GraphIndex, plan: Plan) -> list[str]:
    """Tensors that ONNX Runtime needs quantized to run the node before them in integers."""
    nodes = {node.name: node for node in graph.model.graph.node}
    names = [layer.node for layer in plan.layers if layer.op == "Conv"] + [item.node for item in plan.residuals]
    found = []
    for name in names:
        tensor = graph.after_relu(nodes[name].output[0])
        if tensor in graph.outputs:
            continue
        found.append(tensor)
        reader = graph.only_consumer(tensor)
        if reader is not None and reader.op_type == "MaxPool":
            found.append(reader.output[0])
    return found


def tensors(model: ModelProto, plan: Plan) -> list[str]:
    """Every activation that some dialect quantizes: what calibration has to observe."""
    return list(dict.fromkeys([*cuts(model, plan, TENSORRT), *cuts(model, plan, CPU)]))


def tied(model: ModelProto, amax: dict[str, float]) -> dict[str, float]:
    """Ranges in which the output of a MaxPool has its input's, so that the pool runs on integers unchanged."""
    tied = dict(amax)
    for node in model.graph.node:
        if node.op_type == "MaxPool" and node.input[0] in tied and node.output[0] in tied:
            tied[node.output[0]] = tied[node.input[0]]
    return tied


def weight_bits(choice: str) -> int:
    """8 or 7 for "8bit" / "7bit"; "auto" is 7 on an x86 CPU without VNNI, whose 16-bit sums saturate."""
    one_of("quant.cpu_weights", choice, ("auto", "8bit", "7bit"))
    if choice != "auto":
        return int(choice[0])
    return 7 if int8_saturates() else 8
