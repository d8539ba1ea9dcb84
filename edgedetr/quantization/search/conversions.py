"""What it costs to convert a tensor between two groups of unequal precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from scipy.optimize import nnls

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.groups import Group
from edgedetr.quantization.search.front import Edge

_PASSES = ("Relu", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class ConversionTime:
    """Milliseconds of one conversion: to start its kernel, and for each element of its tensor."""

    start_ms: float
    element_ms: float

    def of(self, elements: int) -> float:
        return self.start_ms + self.element_ms * elements

    @classmethod
    def fitted(cls, seen: Sequence[tuple[int, float]], otherwise: ConversionTime) -> ConversionTime:
        """The line through (elements, milliseconds) with the least relative squares; `otherwise` where there are none.

        One rate for all would charge a large tensor for the starts of many small kernels.
        """
        points = np.array([(elements, ms) for elements, ms in seen if elements > 0 and ms > 0], dtype=float)
        if not len(points):
            return otherwise
        rows = np.column_stack([np.ones(len(points)), points[:, 0]]) / points[:, 1:]
        scale = rows.max(axis=0)  # the two columns differ by orders of magnitude
        start, element = nnls(rows / scale, np.ones(len(points)))[0] / scale
        return cls(float(start), float(element))


def edges_between(
    graph: GraphIndex,
    groups: Sequence[Group],
    quantized: Mapping[str, Sequence[str]],
    cost: Callable[[str], float],
    converted: AbstractSet[str],
) -> tuple[Edge, ...]:
    """Pairs of groups between which a tensor goes as integers if both are INT8, with the cost where one is float.

    quantized   {tensor: nodes that read it dequantized}, where all groups are INT8
    cost        of converting a tensor
    converted   tensors that are converted even if all groups are INT8: their time is in the groups' own
    """
    by_node = {node: group.id for group in groups for node in group.nodes}
    found: dict[tuple[str, str], float] = {}
    for tensor, readers in quantized.items():
        producer = _maker(tensor, graph, by_node)
        if not producer or tensor in converted:
            continue
        others = {by_node[reader] for reader in readers if reader in by_node} - {producer}
        for other in sorted(others):
            # Several readers share one conversion where the producer is the odd one out; each pays a part.
            found[producer, other] = found.get((producer, other), 0.0) + cost(tensor) / len(others)
    return tuple(Edge(first, second, penalty) for (first, second), penalty in found.items() if penalty > 0)


def elements_of(graph: GraphIndex, tensor: str) -> int:
    """Elements of a tensor for one image; 0 where its shape is not known."""
    return prod(size or 1 for size in graph.shape(tensor) or [0])


def _maker(tensor: str, graph: GraphIndex, by_node: Mapping[str, str]) -> str:
    """The group whose kernel can write a tensor as integers: through operators that leave values as they are."""
    node = graph.producers.get(tensor)
    while node is not None and node.name not in by_node:
        node = graph.producers.get(node.input[0]) if node.op_type in _PASSES else _summed(node, graph, by_node)
    return by_node[node.name] if node is not None else ""


def _summed(node: Any, graph: GraphIndex, by_node: Mapping[str, str]) -> Any:
    """Of a residual sum, the convolution into whose kernel it goes; None for another node."""
    if node.op_type != "Add":
        return None
    makers = [graph.producers[name] for name in node.input if name in graph.producers]
    return next((maker for maker in reversed(makers) if maker.op_type == "Conv" and maker.name in by_node), None)
