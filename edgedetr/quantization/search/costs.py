"""What each group costs in float and in INT8 on a target, and what it costs to convert between two groups.

Measured where the target's library runs here: the float graph and the graph with every group in INT8 are profiled in
turns, and the time of each kernel goes to the group that it belongs to. A backend fuses, so a kernel is found by the
node it is named after, or by the nodes before it up to a group: bias, activation, residual sum, Q/DQ. For TensorRT the
costs follow from multiply-accumulates, which is a model and no measurement.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from edgedetr.artifacts import OPENVINO, ORT
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.progress import Progress
from edgedetr.quantization.groups import Group
from edgedetr.quantization.search.front import Choice, Edge
from edgedetr.quantization.search.kernel_times import KernelTime, kernel_times

log = logging.getLogger(__name__)

ROUNDS = 20  # runs of each graph in one turn of profiling
MOST_ROUNDS = 200
STEADY = 0.02  # profiling ends when twice the error of the whole gain is below this share of the float time
SIGMAS = 2.0  # by how many standard errors a group's gain is discounted: what is not faster beyond noise stays float
BACK = 6  # nodes that are followed from a kernel's node back to its group: DQ, bias, activation (two for SiLU), sum, Q
# A model for TensorRT: products of 8 bits take half the time of FP16, and a conversion reads and writes each element.
# Only the ratio matters: 20 multiply-accumulates in the time of one byte (Orin: 5 to 21 x 10^12 of FP16 a second, 102
# to 205 GB/s, of which kernels reach a fraction).
MACS_PER_BYTE = 20.0
_PASSES = ("Relu", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class GroupCost:
    """Milliseconds of one image; sigma_ms is the standard error of int8_ms - float_ms."""

    float_ms: float
    int8_ms: float
    sigma_ms: float

    @property
    def gain_ms(self) -> float:
        """Time in INT8 minus time in float, discounted by what the measurement cannot resolve."""
        return self.int8_ms - self.float_ms + SIGMAS * self.sigma_ms


@dataclass(frozen=True)
class Costs:
    """The costs of all groups on one target.

    source   what they rest on, for people
    measured  False: a model, no measurement
    groups   {group id: cost}
    edges    penalties in milliseconds between groups of unequal precision
    float_ms, rest_ms   the whole float graph, and what of it belongs to no group
    """

    target: str
    source: str
    measured: bool
    groups: Mapping[str, GroupCost]
    edges: tuple[Edge, ...]
    float_ms: float
    rest_ms: float

    def choices(self, distances: Mapping[str, float]) -> dict[str, Choice]:
        """What the solver takes: {group id: gain and distance} of the groups that have a distance."""
        return {name: Choice(self.groups[name].gain_ms, distance) for name, distance in distances.items()}

    def worth_trying(self) -> tuple[str, ...]:
        """Groups that can be faster in INT8 beyond noise, if their neighbors are INT8 too; the others stay float."""
        saved = dict.fromkeys(self.groups, 0.0)
        for edge in self.edges:
            for name in (edge.first, edge.second):
                saved[name] += edge.penalty
        return tuple(name for name, cost in self.groups.items() if cost.gain_ms < saved[name])

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Costs:
        groups = {name: GroupCost(**cost) for name, cost in raw["groups"].items()}
        return cls(**{**raw, "groups": groups, "edges": tuple(Edge(**edge) for edge in raw["edges"])})


def measured_costs(
    graph: GraphIndex,
    groups: Sequence[Group],
    float_model: bytes,
    int8_model: bytes,
    quantized: Mapping[str, Sequence[str]],
    backend: str,
    images: np.ndarray,
    *,
    threads: int | None = None,
    rounds: int = MOST_ROUNDS,
    progress: Progress | None = None,
) -> Costs:
    """Profile both graphs until the gain is steady.

    graph       the float graph with split convolutions
    int8_model  the same with every group in INT8
    quantized   {tensor that is quantized there: names of the nodes that read it dequantized}
    images      [1, 3, H, W]
    """
    owner = owner_of(graph, groups)
    parts: dict[str, list[list[KernelTime]]] = {"float": [], "int8": []}
    for done in range(0, rounds, ROUNDS):
        if progress:
            progress("profile", done, rounds)
        turn = kernel_times({"float": float_model, "int8": int8_model}, backend, images, ROUNDS, threads=threads)
        for name, kernels in turn.items():
            parts[name].append(kernels)
        floats, integers = (_by_group(parts[name], owner, groups) for name in ("float", "int8"))
        # Sums of medians: a run that was disturbed anywhere would count as a whole.
        total = float(sum(np.median(times) for times in floats.values()))
        error = float(np.sqrt(sum(error_of_median(integers[name] - floats[name]) ** 2 for name in floats)))
        if SIGMAS * error < STEADY * total:
            break
    if progress:
        progress("profile", rounds, rounds)
    costs = {
        group.id: GroupCost(
            float(np.median(floats[group.id])) * 1e3,
            float(np.median(floats[group.id]) + np.median(integers[group.id] - floats[group.id])) * 1e3,
            error_of_median(integers[group.id] - floats[group.id]) * 1e3,
        )
        for group in groups
    }
    rate, converted = _conversions(parts["int8"], graph)
    edges = edges_between(graph, groups, quantized, lambda tensor: rate * _elements(graph, tensor) * 1e3, converted)
    library = {ORT: "ONNX Runtime", OPENVINO: "OpenVINO"}[backend]
    runs = len(next(iter(floats.values()))) if floats else 0
    return Costs(
        backend,
        f"profile of {library}, {runs} runs of each graph in turns",
        True,
        costs,
        edges,
        total * 1e3,
        float(np.median(floats[""])) * 1e3,
    )


def modelled_costs(
    graph: GraphIndex, groups: Sequence[Group], quantized: Mapping[str, Sequence[str]], target: str
) -> Costs:
    """Costs by multiply-accumulates, in units of a million of them per millisecond: not a measurement."""
    costs = {group.id: GroupCost(group.macs / 1e6, group.macs / 2e6, 0.0) for group in groups}
    edges = edges_between(graph, groups, quantized, lambda t: 3 * MACS_PER_BYTE * _elements(graph, t) / 1e6, set())
    total = sum(cost.float_ms for cost in costs.values())
    source = "a model by multiply-accumulates, no measurement"
    return Costs(target, source, False, costs, edges, total, 0.0)


# ---------------------------------------------------------------------------------------------- from kernels to groups


def owner_of(graph: GraphIndex, groups: Sequence[Group]) -> Callable[[str], str]:
    """A function from the name of a node or tensor to the id of the group that it belongs to; "" for none."""
    by_node = {node: group.id for group in groups for node in group.nodes}
    found: dict[str, str] = {}

    def owner(name: str) -> str:
        if name not in found:
            found[name] = _own_name(name, by_node) or _upstream(name, graph, by_node)
        return found[name]

    return owner


def _own_name(name: str, by_node: Mapping[str, str]) -> str:
    """The group of the node that a name is, or begins with: a fused kernel adds to the name of its first node."""
    while name:
        if name in by_node:
            return by_node[name]
        cut = max(name.rfind("/"), name.rfind("."), name.rfind("_"))
        name = name[:cut] if cut > 0 else ""
    return ""


def _upstream(name: str, graph: GraphIndex, by_node: Mapping[str, str]) -> str:
    """The group before a node or tensor, at most BACK nodes away, with no other computed branch to choose from."""
    node = graph.node_by_name.get(name) or graph.producers.get(name)
    if node is None:  # a Q or DQ node: its tensor's name and a suffix
        for suffix in ("_QuantizeLinear", "_DequantizeLinear", "_quantized", "_dequantized"):
            if name.endswith(suffix):
                node = graph.producers.get(name.removesuffix(suffix))
    for _ in range(BACK):
        if node is None or node.op_type in ("Concat", "Split", "Gather", "Softmax", "LayerNormalization"):
            return ""
        if node.name in by_node:
            return by_node[node.name]
        inputs = [graph.producers[tensor] for tensor in node.input if tensor in graph.producers]
        inputs.sort(key=lambda before: graph.order.get(before.output[0], -1))
        node = inputs[-1] if inputs else None  # of a residual sum: the later branch, into whose kernel it goes
    return ""


def _by_group(
    parts: Sequence[Sequence[KernelTime]], owner: Callable[[str], str], groups: Sequence[Group]
) -> dict[str, np.ndarray]:
    """{group id, "" = no group: [R] seconds of each run}, over several turns of profiling."""
    turns = []
    for kernels in parts:
        runs = len(kernels[0].seconds) if kernels else 0
        turn = {name: np.zeros(runs) for name in ("", *(group.id for group in groups))}
        for kernel in kernels:
            name = next(filter(None, map(owner, kernel.names)), "")
            turn[name] = turn[name] + kernel.seconds
        turns.append(turn)
    return {name: np.concatenate([turn[name] for turn in turns]) for name in turns[0]}


def error_of_median(differences: np.ndarray) -> float:
    """Standard error of the median, from the median absolute deviation (both are robust against a disturbed run)."""
    if not len(differences):
        return float("inf")
    deviation = 1.4826 * float(np.median(np.abs(differences - np.median(differences))))
    return 1.2533 * deviation / float(np.sqrt(len(differences)))


# --------------------------------------------------------------------------------------------------------- conversions


def edges_between(
    graph: GraphIndex,
    groups: Sequence[Group],
    quantized: Mapping[str, Sequence[str]],
    cost: Callable[[str], float],
    converted: set[str],
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


def _conversions(parts: Sequence[Sequence[KernelTime]], graph: GraphIndex) -> tuple[float, set[str]]:
    """(seconds of converting one element, tensors that kernels convert), from profiles of the graph in INT8."""
    seconds, elements, tensors = 0.0, 0, set[str]()
    for kernel in parts[-1]:
        name = next((n for n in kernel.names if n.endswith(("_QuantizeLinear", "_DequantizeLinear"))), "")
        tensor = name.removesuffix("_QuantizeLinear").removesuffix("_DequantizeLinear")
        size = _elements(graph, tensor) if name else 0
        if size:
            tensors.add(tensor)
            seconds += float(np.median(kernel.seconds))
            elements += size
    # Without one such kernel: a byte read and four written at 10 GB/s, a slow core's share of a memory bus.
    return (seconds / elements if elements else 5e-10), tensors


def _elements(graph: GraphIndex, tensor: str) -> int:
    return prod(size or 1 for size in graph.shape(tensor) or [0])
