"""Put fake quantizers into a fused detector, one at each place that the plan's INT8 graph quantizes.

Nodes of the graph are mapped to modules by their names, which are module paths, and sums by their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgedetr.errors import TrainingError
from edgedetr.models.detector import DetrModel
from edgedetr.models.module_paths import module_path
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import Layer, QuantizationPlan, Residual
from edgedetr.quantization.quantized_tensors import quantized_tensors
from edgedetr.quantization.target import TENSORRT
from edgedetr.training.qat.quantized_sums import QuantizedSums
from edgedetr.training.qat.quantizers import (
    InputPart,
    LayerQuantizer,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPool,
    TensorRange,
)
from edgedetr.training.qat.same_tensors import REORDERED, difference

BRANCH = "/branch."  # in the names of the convolutions into which `split_concats` splits one

Place = tuple[str, int]  # name of a node, and which of its inputs is quantized


class Insertion:
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
                if (number, index) not in operands and difference(self.values[item.tensor], operand) == 0
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
                if all(difference(self.values[one.data], piece) <= REORDERED for one, piece in zip(call, pieces))
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
