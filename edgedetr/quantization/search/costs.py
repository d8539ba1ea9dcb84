"""What each group costs in float and in INT8 on a target, and what it costs to convert between two groups.

Measured where the target's library runs here: the float graph and the graph with every group in INT8 are profiled in
turns, and the time of each kernel goes to the group that it belongs to. For TensorRT, a profile from the device has the
same (device_costs.py); without one the costs follow from multiply-accumulates, which is a model and no measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

from edgedetr.artifacts import OPENVINO, ORT
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.progress import Progress
from edgedetr.quantization.groups import Group
from edgedetr.quantization.search.conversions import ConversionTime, edges_between, elements_of
from edgedetr.quantization.search.front import Choice, Edge
from edgedetr.quantization.search.kernel_times import KernelTime, kernel_times
from edgedetr.quantization.search.owners import PAIR, shares_of
from edgedetr.runtime.latency import error_of_median

ROUNDS = 20  # runs of each graph in one turn of profiling
MOST_ROUNDS = 200
STEADY = 0.02  # profiling ends when twice the error of the whole gain is below this share of the float time
SIGMAS = 2.0  # by how many standard errors a group's gain is discounted: what is not faster beyond noise stays float
# A model for TensorRT: products of 8 bits take half the time of FP16, and a conversion reads and writes each element.
# Only the ratio matters: 20 multiply-accumulates in the time of one byte (Orin: 5 to 21 x 10^12 of FP16 a second, 102
# to 205 GB/s, of which kernels reach a fraction).
MACS_PER_BYTE = 20.0
# Without a conversion in a profile: a byte read and four written at 10 GB/s, a slow core's share of a memory bus.
CPU_CONVERSION = ConversionTime(0.0, 5e-7)


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
class Change:
    """Predicted time of a placement minus that of the float graph, and its standard error, milliseconds."""

    ms: float
    error_ms: float


@dataclass(frozen=True)
class Costs:
    """The costs of all groups on one target.

    source   what they rest on, for people
    measured  False: a model, no measurement
    groups   {group id: cost}
    edges    penalties in milliseconds between groups of unequal precision
    float_ms, rest_ms   the whole float graph, and what of it belongs to no group
    float_conversion_ms, int8_conversion_ms   what of the float graph, and of the graph with every group in INT8, only
                        converts types or layouts; it is in the costs of its group too, if it has one
    """

    target: str
    source: str
    measured: bool
    groups: Mapping[str, GroupCost]
    edges: tuple[Edge, ...]
    float_ms: float
    rest_ms: float
    float_conversion_ms: float = 0.0
    int8_conversion_ms: float = 0.0

    def choices(self, distances: Mapping[str, float]) -> dict[str, Choice]:
        """What the solver takes: {group id: gain and distance} of the groups that have a distance.

        The others stay float, so what is converted between them and a group in INT8 is part of that group's time.
        """
        gains = {name: self.groups[name].gain_ms for name in distances}
        for edge in self.edges:
            for name, other in ((edge.first, edge.second), (edge.second, edge.first)):
                if name in gains and other not in gains:
                    gains[name] += edge.penalty
        return {name: Choice(gains[name], distance) for name, distance in distances.items()}

    def edges_among(self, names: Collection[str]) -> list[Edge]:
        """The edges of which both groups are among these: what the solver takes beside `choices`."""
        return [edge for edge in self.edges if edge.first in names and edge.second in names]

    def change(self, int8: Iterable[str]) -> Change:
        """What a placement is predicted to save or cost, without the discount that each group has for the solver.

        The groups' errors are independent, so their squares add up: 70 discounts of a hundredth of a millisecond would
        hide a gain of half a millisecond that is known to a tenth of that.
        """
        chosen = set(int8)
        costs = [self.groups[name] for name in chosen]
        converted = sum(edge.penalty for edge in self.edges if (edge.first in chosen) != (edge.second in chosen))
        saved = sum(cost.int8_ms - cost.float_ms for cost in costs)
        return Change(saved + converted, sqrt(sum(cost.sigma_ms**2 for cost in costs)))

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


def modelled_costs(
    graph: GraphIndex, groups: Sequence[Group], quantized: Mapping[str, Sequence[str]], target: str
) -> Costs:
    """Costs by multiply-accumulates, in units of a million of them per millisecond: not a measurement."""
    costs = {group.id: GroupCost(group.macs / 1e6, group.macs / 2e6, 0.0) for group in groups}
    edges = edges_between(graph, groups, quantized, lambda t: 3 * MACS_PER_BYTE * elements_of(graph, t) / 1e6, set())
    total = sum(cost.float_ms for cost in costs.values())
    source = "a model by multiply-accumulates, no measurement"
    return Costs(target, source, False, costs, edges, total, 0.0)


# ----------------------------------------------------------------------------------------------- from kernels to groups


@dataclass(frozen=True)
class Timed:
    """One kernel of one graph.

    shares     {group id: share of its time}; what is left over belongs to no group
    ms         median of its runs
    error_ms   standard error of the median
    """

    shares: Mapping[str, float]
    ms: float
    error_ms: float


def group_costs(groups: Sequence[Group], floats: Sequence[Timed], integers: Sequence[Timed]) -> dict[str, GroupCost]:
    """The cost of each group from the kernels of the float graph and of the graph with every group in INT8.

    Sums of the kernels' medians, not the median of sums: in a run that is disturbed anywhere, most kernels are not.
    """
    times = {group.id: [0.0, 0.0] for group in groups}
    variance = dict.fromkeys(times, 0.0)
    for index, kernels in enumerate((floats, integers)):
        for kernel in kernels:
            for name, share in kernel.shares.items():
                times[name][index] += share * kernel.ms
                variance[name] += (share * kernel.error_ms) ** 2
    return {name: GroupCost(before, after, sqrt(variance[name])) for name, (before, after) in times.items()}


def ungrouped_ms(kernels: Sequence[Timed]) -> float:
    """Milliseconds of a graph that belong to no group."""
    return sum(kernel.ms * (1 - sum(kernel.shares.values())) for kernel in kernels)


# --------------------------------------------------------------------------------------------- profiles that run here


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
    shares = shares_of(graph, groups)
    parts: dict[str, list[list[KernelTime]]] = {"float": [], "int8": []}
    for done in range(0, rounds, ROUNDS):
        if progress:
            progress("profile", done, rounds)
        turn = kernel_times({"float": float_model, "int8": int8_model}, backend, images, ROUNDS, threads=threads)
        for name, kernels in turn.items():
            parts[name].append(kernels)
        floats, integers = (_timed(_joined(parts[name]), shares) for name in ("float", "int8"))
        total = sum(kernel.ms for kernel in floats)
        error = sqrt(sum(kernel.error_ms**2 for kernel in (*floats, *integers)))
        if SIGMAS * error < STEADY * total:
            break
    if progress:
        progress("profile", rounds, rounds)
    before, after = (_conversions(_joined(parts[name]), graph) for name in ("float", "int8"))
    each = ConversionTime.fitted([(elements_of(graph, t), ms) for t, ms in after], CPU_CONVERSION)
    converted = {tensor for tensor, _ in after}
    edges = edges_between(graph, groups, quantized, lambda t: each.of(elements_of(graph, t)), converted)
    library = {ORT: "ONNX Runtime", OPENVINO: "OpenVINO"}[backend]
    return Costs(
        backend,
        f"profile of {library}, {ROUNDS * len(parts['float'])} runs of each graph in turns",
        True,
        group_costs(groups, floats, integers),
        edges,
        total,
        ungrouped_ms(floats),
        sum(ms for _, ms in before),
        sum(ms for _, ms in after),
    )


def _joined(turns: Sequence[Sequence[KernelTime]]) -> list[KernelTime]:
    """The kernels of several turns of profiling with the runs of all of them."""
    found: dict[tuple[str, tuple[str, ...]], list[np.ndarray]] = {}
    for kernel in (kernel for turn in turns for kernel in turn):
        found.setdefault((kernel.operator, kernel.names), []).append(kernel.seconds)
    return [KernelTime(*key, np.concatenate(seconds)) for key, seconds in found.items()]


def _timed(kernels: Sequence[KernelTime], shares: Callable[[Iterable[str]], dict[str, float]]) -> list[Timed]:
    return [
        Timed(shares(kernel.names), float(np.median(kernel.seconds)) * 1e3, error_of_median(kernel.seconds) * 1e3)
        for kernel in kernels
    ]


def _conversions(kernels: Sequence[KernelTime], graph: GraphIndex) -> list[tuple[str, float]]:
    """(tensor, milliseconds) of the kernels that only convert a tensor to integers or back."""
    found = []
    for kernel in kernels:
        name = next((name for name in kernel.names if name.endswith(PAIR)), "")
        for suffix in PAIR:
            name = name.removesuffix(suffix)
        if name and elements_of(graph, name):
            found.append((name, float(np.median(kernel.seconds)) * 1e3))
    return found
