"""A student of quantization-aware training beside its INT8 graph in ONNX Runtime, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto
from tiny_network import SIGNED, run
from torch import Tensor

from edgedetr.models.detector import DetrModel
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import QuantizationPlan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.training.qat.quantizers import TensorRange


def clipped_ranges(model: ModelProto, plan: QuantizationPlan, images: np.ndarray) -> dict[str, float]:
    """{tensor: four fifths of its largest magnitude on the images}, so that some values are clipped."""
    tensors = tensors_to_observe(GraphIndex(model), plan)
    values = dict(zip(tensors, run(model, images, tensors)))
    return share_pool_ranges(model, {name: 0.8 * float(np.abs(value).max()) for name, value in values.items()})


def largest_differences(
    student: DetrModel, graph: GraphIndex, plan: QuantizationPlan, amax: Mapping[str, float], images: np.ndarray
) -> dict[str, float]:
    """{tensor: largest difference between PyTorch and ONNX Runtime}, of quantizers' inputs relative to their largest
    magnitude, and of "logits" and "boxes".

    The two libraries add in different orders, so that a value near the middle between two levels may be rounded up in
    one and down in the other, and whole maps differ after it. Therefore each quantizer in PyTorch gets the value that
    ONNX Runtime has there: what is compared is everything that one quantizer's levels become up to the next quantizers.
    """
    ranges: list[TensorRange] = list(student.ranges)
    names = ["logits", "boxes", *(one.tensor for one in ranges)]
    values = dict(zip(names, run(insert_qdq(graph, plan, amax, SIGNED), images, names)))
    found: dict[str, float] = {}

    def put(module: TensorRange, inputs: tuple[Tensor]) -> tuple[Tensor]:
        wanted, actual = torch.from_numpy(values[module.tensor]), inputs[0]
        if wanted.dim() == 4 and wanted.shape != actual.shape:  # convolved before its Resize
            wanted = F.interpolate(wanted, actual.shape[-2:])
        wanted = wanted.reshape(actual.shape)
        difference = float((wanted - actual).abs().max() / wanted.abs().max().clamp(min=1e-6))
        found[module.tensor] = max(difference, found.get(module.tensor, 0.0))
        return (wanted,)

    hooks = [one.register_forward_pre_hook(put) for one in ranges]
    with torch.no_grad():
        outputs = student(student.normalize(torch.from_numpy(images)), last_only=True)
    for hook in hooks:
        hook.remove()
    assert set(found) == {one.tensor for one in ranges}
    for name, actual in (("logits", outputs.logits[0]), ("boxes", outputs.boxes[0])):
        found[name] = float(np.abs(values[name] - actual.numpy()).max())
    return found
