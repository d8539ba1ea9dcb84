"""The student: a copy of a trained detector, fused as it is deployed, with a fake quantizer at each place of the plan.

Nodes of the graph are mapped to modules by their names, which are module paths, and sums by their values; then one
image goes through both, and every tensor that is quantized must be the same in both. What differs is an error that
names the node, so that a student never learns with other places than its INT8 graph has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgedetr.errors import TrainingError
from edgedetr.models.deploy import fuse
from edgedetr.models.detector import DetrModel
from edgedetr.models.module_paths import module_path
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.policy import Layer, QuantizationPlan, Residual
from edgedetr.quantization.qdq import TENSORRT, quantized_tensors
from edgedetr.training.qat.quantizers import (
    InputPart,
    LayerQuantizer,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPool,
    TensorRange,
)

BRANCH = "/branch."  # in the names of the convolutions into which `split_concats` splits one
RANGES = "ranges"  # attribute of the student that owns the quantizers of tensors
CLOSE = 1e-3  # largest difference of a tensor in PyTorch and in ONNX Runtime, of its largest magnitude
REORDERED = 0.02  # of a tensor's values may differ more: queries of equal score change places

Place = tuple[str, int]  # name of a node, and which of its inputs is quantized


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
    values, image = _values(graph, tensors, size)
    done = _Insertion(student, graph, plan, ranges, values, image).insert()
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


# ------------------------------------------------------------------------------------------------------------- sums


class QuantizedSums:
    """The forward of a module in which operands of some sums are quantized.

    operands   {(which sum of the call, which operand): quantizer}; sums of two activations are counted, those of the
               modules inside as well
    seen       where the operands of every sum are noted, or None
    """

    def __init__(
        self,
        module: nn.Module,
        operands: Mapping[tuple[int, int], TensorRange],
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.module, self.operands, self.seen = module, dict(operands), seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Sums(self.operands, self.seen):
            return type(self.module).forward(self.module, *args, **kwargs)


class _Sums(TorchFunctionMode):
    """Replaces operands of sums, or notes them in `seen` where it is a list."""

    OPERATORS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)

    def __init__(
        self, operands: Mapping[tuple[int, int], TensorRange], seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.operands, self.seen, self.count = operands, seen, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self.OPERATORS and len(args) >= 2 and all(_is_activation(one) for one in args[:2]):
            if self.seen is not None:
                self.seen.append((args[0].detach().clone(), args[1].detach().clone()))
            pair = [
                self.operands[self.count, i](x) if (self.count, i) in self.operands else x
                for i, x in enumerate(args[:2])
            ]
            args = (*pair, *args[2:])
            self.count += 1
        return func(*args, **(kwargs or {}))


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point()


# ---------------------------------------------------------------------------------------------------------- insertion


class _Insertion:
    """Puts quantizers into a fused detector; `insert` gives the places that have one afterwards.

    values   {tensor: value} in ONNX Runtime on `image`
    """

    def __init__(
        self,
        student: DetrModel,
        graph: GraphIndex,
        plan: QuantizationPlan,
        ranges: Mapping[str, TensorRange],
        values: Mapping[str, np.ndarray],
        image: Tensor,
    ) -> None:
        self.student, self.graph, self.plan, self.ranges = student, graph, plan, ranges
        self.values, self.image = values, image
        self.modules = dict(student.named_modules())
        self.name = student.member.name

    def insert(self) -> set[Place]:
        layers = self._calls_in_graph()
        owners: dict[str, list[Residual]] = {}
        for item in self.plan.residuals:
            owners.setdefault(self._path_of(item.node), []).append(item)
        sums, inputs = self._watch(list(owners), layers)
        done = set()
        for path, items in owners.items():
            done |= self._insert_sums(path, items, sums[path])
        for path, calls in layers.items():
            done |= self._insert_layer(path, calls, inputs[path])
        return done | self._insert_pools()

    def _path_of(self, node: str) -> str:
        return module_path(node.partition(BRANCH)[0], self.modules)

    def _calls_in_graph(self) -> dict[str, list[list[Layer]]]:
        """{path of a module: its calls in the order of the graph}; a call is a node or, behind a Concat, its branches.

        Errors: TrainingError for a node that no convolution or Linear has made, and for a weight that is INT8 in one
        call and float in another.
        """
        planned = {layer.node: layer for layer in self.plan.layers}
        found: dict[str, dict[str, list[Layer]]] = {}
        left: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in self.graph.initializers:
                continue
            path = self._path_of(node.name)
            if node.name in planned:
                calls = found.setdefault(path, {})
                calls.setdefault(node.name.partition(BRANCH)[0], []).append(planned[node.name])
            else:
                left[path] = node.name
        for path, calls in found.items():
            name, module = next(iter(calls)), self.modules.get(path)
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                kind = type(module).__name__ if path and module is not None else "no module"
                raise TrainingError(
                    f"{self.name}: {name} is INT8 in the plan, and {kind} was found for it, not a convolution or "
                    "Linear; quantization-aware training does not support it"
                )
            if path in left:
                raise TrainingError(
                    f"{self.name}: {path} is INT8 in {name} and float in {left[path]}; quantization-aware training "
                    "needs one weight to be either; change the policy"
                )
        return {path: list(calls.values()) for path, calls in found.items()}

    # ---- one image through the float detector: what sums and layers read

    def _watch(
        self, owners: Sequence[str], layers: Mapping[str, list[list[Layer]]]
    ) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], dict[str, list[Tensor]]]:
        """{module: operands of its sums}, and {module: input of each call} of the layers."""
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in owners}
        inputs: dict[str, list[Tensor]] = {path: [] for path in layers}
        hooks = []
        for path, list_of in inputs.items():

            def note(_module: nn.Module, args: tuple[Tensor, ...], list_of: list[Tensor] = list_of) -> None:
                list_of.append(args[0].detach().clone())

            hooks.append(self.student.get_submodule(path).register_forward_pre_hook(note))
        for path in owners:
            module = self.student.get_submodule(path)
            module.forward = QuantizedSums(module, {}, sums[path])
        try:
            with torch.no_grad():
                self.student(self.student.normalize(self.image), last_only=True)
        finally:
            for hook in hooks:
                hook.remove()
            for path in owners:
                del self.student.get_submodule(path).forward
        return sums, inputs

    def _insert_sums(self, path: str, items: Sequence[Residual], seen: list[tuple[Tensor, Tensor]]) -> set[Place]:
        """Which operand of which sum a residual is, is found by its value."""
        operands: dict[tuple[int, int], TensorRange] = {}
        for item in items:
            at = [
                (number, index)
                for number, pair in enumerate(seen)
                for index, operand in enumerate(pair)
                if (number, index) not in operands and _difference(self.values[item.tensor], operand) == 0
            ]
            if not at:
                raise TrainingError(
                    f"{self.name}: no sum of {path or 'the model'} reads what {item.node} reads; quantization-aware "
                    "training does not support it"
                )
            operands[at[0]] = self.ranges[item.tensor]
        module = self.student.get_submodule(path)
        module.forward = QuantizedSums(module, operands)
        return {(item.node, item.index) for item in items}

    def _insert_layer(self, path: str, calls: list[list[Layer]], inputs: list[Tensor]) -> set[Place]:
        module = self.modules[path]
        order = self._order(path, calls, inputs, 1 if isinstance(module, nn.Conv2d) else -1)
        parts = []
        for index, layer in enumerate(calls[0]):
            node = self.graph.node_by_name[layer.node]
            parts.append(
                InputPart(
                    self._width(layer) if len(calls[0]) > 1 else 0,
                    tuple(None if call is None else self.ranges[call[index].data] for call in order),
                    len(node.input) > 2 and bool(node.input[2]),
                )
            )
        if isinstance(module, nn.Conv2d):
            self._replace(path, QuantizedConv2d(module, LayerQuantizer(parts)))
        elif isinstance(module, nn.Linear):
            self._replace(path, QuantizedLinear(module, LayerQuantizer(parts)))
        return {(layer.node, index) for call in calls for layer in call for index in (0, 1)}

    def _order(self, path: str, calls: list[list[Layer]], inputs: list[Tensor], axis: int) -> list[list[Layer] | None]:
        """For every call in PyTorch that of the graph, found by its input; None for a call that the graph lacks.

        The graph lacks what it computes from constants (the first layer's positions of learned queries), and what
        only a loss reads (the boxes of all proposals).
        """
        if len(inputs) == len(calls) == 1:
            return list(calls)
        left = list(calls)
        order: list[list[Layer] | None] = []
        for x in inputs:
            widths = [self._width(layer) for layer in left[0]] if left else []
            pieces = x.split(widths, axis) if len(widths) > 1 else (x,)
            fits = [
                call
                for call in left
                if all(_difference(self.values[one.data], piece) <= REORDERED for one, piece in zip(call, pieces))
            ]
            order.append(fits[0] if fits else None)
            left = [call for call in left if not fits or call is not fits[0]]
        if left:
            raise TrainingError(
                f"{self.name}: no call of {path} reads what {left[0][0].node} reads; quantization-aware training does "
                "not support it"
            )
        return order

    def _width(self, layer: Layer) -> int:
        """Input channels of a convolution."""
        return int(self.graph.initializers[layer.weight].dims[1])

    def _insert_pools(self) -> set[Place]:
        done = set()
        for name, tensor in quantized_tensors(self.graph, self.plan, TENSORRT).items():
            for node, index in tensor.consumers or ():
                if self.graph.node_by_name[node].op_type == "MaxPool":
                    path = self._path_of(node)
                    module = self.modules.get(path)
                    if not isinstance(module, nn.MaxPool2d):
                        raise TrainingError(
                            f"{self.name}: no MaxPool2d was found for {node}; quantization-aware training does not "
                            "support it"
                        )
                    self._replace(path, QuantizedPool(module, self.ranges[name]))
                    done.add((node, index))
        return done

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.student.get_submodule(parent), name, module)


# -------------------------------------------------------------------------------------------------------- the same?


def _values(graph: GraphIndex, tensors: Sequence[str], size: tuple[int, int]) -> tuple[dict[str, np.ndarray], Tensor]:
    """{tensor: value} in ONNX Runtime on an image of noise, and that image [1, 3, H, W]."""
    image = np.random.default_rng(0).integers(0, 256, (1, 3, *size)).astype(np.float32)
    session = GraphSession(graph.model, [name for name in tensors if name != "images"], threads=1)
    return {"images": image, **session.run({"images": image})}, torch.from_numpy(image)


def _difference(wanted: np.ndarray, actual: Tensor) -> float:
    """The fraction of values in which two tensors differ; 1 where their shapes do not fit.

    A branch of a Concat that the graph convolves before its nearest-neighbor Resize has fewer pixels there.
    """
    one = torch.from_numpy(wanted)
    if one.dim() == actual.dim() == 4 and one.shape != actual.shape:
        one = F.interpolate(one, actual.shape[-2:])
    if one.numel() != actual.numel():
        return 1.0
    one, other = one.reshape(-1), actual.detach().reshape(-1).cpu()
    return float(((one - other).abs() > CLOSE * max(float(one.abs().max()), 1e-6)).float().mean())


def _require_same_tensors(student: DetrModel, values: Mapping[str, np.ndarray], image: Tensor) -> None:
    """Errors: TrainingError where a quantizer meets another tensor than the one that it is named after, or none."""
    ranges: list[TensorRange] = list(getattr(student, RANGES))
    found: dict[str, list[float]] = {one.tensor: [] for one in ranges}

    def compare(module: TensorRange, inputs: tuple[Tensor]) -> None:
        found[module.tensor].append(_difference(values[module.tensor], inputs[0]))

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
