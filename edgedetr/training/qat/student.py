"""The student: a copy of a trained detector, fused as it is deployed, with a fake quantizer at each place of the plan.

insertion.py puts the quantizers in; then one image goes through both, and every tensor that is quantized must be the
same in both. What differs is an error that names the node, so that a student never learns with other places than its
INT8 graph has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from edgedetr.errors import TrainingError
from edgedetr.models.deploy import fuse
from edgedetr.models.detector import DetrModel
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import QuantizationPlan
from edgedetr.quantization.quantized_tensors import quantized_tensors
from edgedetr.quantization.target import TENSORRT
from edgedetr.training.qat.insertion import Insertion, Place
from edgedetr.training.qat.quantizers import LayerQuantizer, QuantizedConv2d, QuantizedLinear, TensorRange
from edgedetr.training.qat.same_tensors import REORDERED, difference, graph_values

RANGES = "ranges"  # attribute of the student that owns the quantizers of tensors


def places_of(graph: GraphIndex, plan: QuantizationPlan) -> set[Place]:
    """Every input that the INT8 graph for TensorRT quantizes: activations and weights."""
    found = {(layer.node, 1) for layer in plan.layers}
    for tensor in quantized_tensors(graph, plan, TENSORRT).values():
        if tensor.consumers is None:
            raise TrainingError(f"{tensor.name} is quantized for every consumer, which cannot be trained")
        found |= tensor.consumers
    return found


def make_student(
    detector: DetrModel,
    graph: GraphIndex,
    plan: QuantizationPlan,
    amax: Mapping[str, float],
    *,
    size: tuple[int, int],
    learned: bool = True,
) -> DetrModel:
    """A copy of the detector that computes as the plan's INT8 graph does, with gradients.

    graph    the float graph of this detector after `split_concats`
    amax     the range that each tensor starts with
    size     (height, width) of the graph's input, pixels
    learned  whether ranges have gradients

    Errors: TrainingError that names the first node without a module, or the first tensor that is another one there.
    """
    student = copy.deepcopy(detector).eval()
    student.progress(1.0)  # the number of queries at the end of training
    fuse(student)
    student.requires_grad_(True)
    tensors = list(quantized_tensors(graph, plan, TENSORRT))
    ranges: dict[str, TensorRange] = {}
    for name in sorted(tensors, key=lambda name: graph.order.get(name, -1)):
        pool = graph.producers.get(name)
        shared = ranges.get(pool.input[0]) if pool is not None and pool.op_type == "MaxPool" else None
        ranges[name] = TensorRange(name, amax[name], learned=learned, shares=shared)
    setattr(student, RANGES, nn.ModuleList(ranges.values()))
    values, image = graph_values(graph, tensors, size)
    done = Insertion(student, graph, plan, ranges, values, image).insert()
    student.backbone.register_forward_pre_hook(_CallCounts(layer_quantizers(student)).reset)
    wanted = places_of(graph, plan)
    if done != wanted:
        missing, extra = sorted(wanted - done), sorted(done - wanted)
        raise TrainingError(
            f"{detector.member.name}: quantizers in PyTorch differ from the plan: missing {missing[:5]}, "
            f"not planned {extra[:5]}; report this, it is a defect"
        )
    _require_same_tensors(student, values, image)
    return student


def learned_ranges(student: DetrModel) -> dict[str, float]:
    """{tensor: amax} of a student."""
    return {one.tensor: one.amax for one in getattr(student, RANGES)}


def layer_quantizers(student: nn.Module) -> list[LayerQuantizer]:
    """Those of all layers."""
    return [one.quantizer for one in student.modules() if isinstance(one, (QuantizedConv2d, QuantizedLinear))]


class _CallCounts:
    """Counts the calls of every layer anew in each forward pass; a hook of the backbone, which is called first."""

    def __init__(self, quantizers: list[LayerQuantizer]) -> None:
        self.quantizers = quantizers

    def reset(self, _module: nn.Module, _inputs: object) -> None:
        for one in self.quantizers:
            one.calls = 0


@contextmanager
def in_float(student: nn.Module) -> Iterator[None]:
    """The student without rounding: the float detector."""
    ranges: list[TensorRange] = list(getattr(student, RANGES))
    switched: list[TensorRange | LayerQuantizer] = [*ranges, *layer_quantizers(student)]
    for one in switched:
        one.enabled = False
    try:
        yield
    finally:
        for one in switched:
            one.enabled = True


def _require_same_tensors(student: DetrModel, values: Mapping[str, np.ndarray], image: Tensor) -> None:
    """Errors: TrainingError where a quantizer meets another tensor than the one that it is named after, or none."""
    ranges: list[TensorRange] = list(getattr(student, RANGES))
    found: dict[str, list[float]] = {one.tensor: [] for one in ranges}

    def compare(module: TensorRange, inputs: tuple[Tensor]) -> None:
        found[module.tensor].append(difference(values[module.tensor], inputs[0]))

    hooks = [one.register_forward_pre_hook(compare) for one in ranges]
    try:
        with torch.no_grad(), in_float(student):
            student(student.normalize(image), last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    for name, differences in found.items():
        if max(differences, default=1.0) > REORDERED:
            what = f"differs in {max(differences):.0%} of its values" if differences else "is read nowhere"
            raise TrainingError(
                f"{student.member.name}: {name} {what} in PyTorch, where the graph quantizes it; quantization-aware "
                "training does not support this graph"
            )
