"""What explicit quantisation in TensorRT accepts; checked before model.int8.onnx is written.

NVIDIA, "Working with quantized types", explicit quantisation: int8 with zero point 0, constant positive scales, one
scale per activation, per-channel weights along the output channels, and nothing between a convolution and its Relu.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from edgedetr.quantization.dialect import SMALLEST_HALF_SCALE
from edgedetr.quantization.wiring import Wiring

OPSET = 19
_KINDS = ("QuantizeLinear", "DequantizeLinear")


def tensorrt_faults(model: ModelProto) -> list[str]:
    """One sentence per fault; empty when the graph is legal."""
    wiring = Wiring(model)
    constants = {name: numpy_helper.to_array(tensor) for name, tensor in wiring.constants.items()}
    opsets = {item.domain: item.version for item in model.opset_import}
    faults = [] if opsets == {"": OPSET} else [f"opsets are {opsets}, expected {OPSET} of the standard domain alone"]
    for node in model.graph.node:
        if node.op_type in _KINDS:
            faults += [f"{node.name}: {fault}" for fault in _faults(node, wiring, constants)]
    return faults


def _faults(node: NodeProto, wiring: Wiring, constants: dict[str, np.ndarray]) -> list[str]:
    scale, zero = (constants.get(name) for name in (*node.input[1:3], "", "")[:2])
    if scale is None or zero is None:
        return ["scale or zero point is not constant"]
    faults = []
    if zero.dtype != np.int8 or zero.any():
        faults.append(f"zero point is {zero.dtype} {zero.max()}, expected int8 0")
    if scale.dtype not in (np.float16, np.float32) or not (np.isfinite(scale).all() and (scale > 0).all()):
        faults.append("scale is not float16 or float32, finite and positive")
    elif scale.min() < SMALLEST_HALF_SCALE:
        faults.append(f"scale {scale.min():.2g} is below 6.1e-5, the smallest normal FP16 number")
    if node.op_type == "QuantizeLinear":
        if scale.ndim:
            faults.append("an activation has one scale per channel, expected one in all")
        maker = wiring.makers.get(node.input[0])
        if maker is not None and maker.op_type == "Conv":
            if any(reader.node.op_type == "Relu" for reader in wiring.readers[node.input[0]]):
                faults.append("stands between a Conv and its Relu")
    return faults
