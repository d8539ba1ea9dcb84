"""Measure how far placements move the detections of the float graph, image by image.

Many placements of one graph differ in few nodes, so what is computed before the first of them is computed once: the
images' activations at a cut through the graph are kept, and of each placement only the rest is run from there. The walk
goes once from the first node to the last; the memory is that of the largest cut, for as many images as fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from edgedetr.onnx_graph.graph_edit import prune, replace_nodes
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.progress import Progress
from edgedetr.quantization.groups import groups_of, macs
from edgedetr.quantization.matched_distance import distances
from edgedetr.quantization.placement import Placement, RangesByObserver, quantized_model
from edgedetr.quantization.policy import Policy, weighted_nodes
from edgedetr.quantization.target import Target
from edgedetr.runtime.backends.base import RawOutputs

MEMORY = 512 * 2**20  # bytes of the activations that are kept
OUTPUTS = ("logits", "boxes")

Values = dict[str, np.ndarray]


@dataclass
class Cost:
    """What the measuring took, in runs of the whole graph on one image, by multiply-accumulates.

    forwards   that were run
    whole      that runs of the whole graph would have taken
    """

    forwards: float = 0.0
    whole: float = 0.0


class DistanceMeter:
    """The float graph, and distances of placements from it (matched_distance.py).

    graph        of a float model whose convolutions behind a Concat are split
    ranges       of every tensor that a placement may quantize
    target       the form of the Q/DQ pairs; they are computed in float arithmetic, as the graph is written
    activation   how logits become scores
    """

    def __init__(
        self,
        graph: GraphIndex,
        policy: Policy,
        ranges: RangesByObserver,
        target: Target,
        activation: str,
        memory: int = MEMORY,
    ) -> None:
        self.graph, self.policy, self.ranges, self.target = graph, policy, ranges, target
        self.activation, self.memory, self.cost = activation, memory, Cost()
        # Selected queries may change their order; fixed ones keep it.
        self.by_identity = not any(node.op_type == "TopK" for node in graph.nodes)
        self.position = {node.name: number for number, node in enumerate(graph.nodes)}
        self.nodes_of = {group.id: group.nodes for group in groups_of(graph, policy)}
        self._cuts = _Cuts(graph)

    def float_gap(self, batches: Sequence[np.ndarray]) -> float:
        """Mean distance of the float graph from its own run without optimizations: what float rounding alone does."""
        plain = GraphSession(self.graph.model, OUTPUTS)
        fast = GraphSession(self.graph.model, OUTPUTS, optimize=True, integers=False)
        found = [self._distance(_raw(plain.run({"images": b})), _raw(fast.run({"images": b}))) for b in batches]
        return float(np.mean(found))

    def measure(
        self,
        placements: Sequence[Placement],
        images: int,
        load: Callable[[int], np.ndarray],
        *,
        known: Callable[[int, int], bool] = lambda placement, image: False,
        report: Callable[[int, int, float], None],
        progress: Progress | None = None,
    ) -> None:
        """Call `report(placement, image, distance)` for every pair that is not known.

        placements   numbered from 0
        images       how many; `load(image)` gives one as the graph takes it, [1, 3, H, W]
        """
        pairs = [(p, i) for p in range(len(placements)) for i in range(images) if not known(p, i)]
        done, total = len(placements) * images - len(pairs), len(placements) * images
        chunk = max(1, self.memory // max(1, self._cuts.most_bytes))
        starts = [self._start(placement) for placement in placements]
        for first in range(0, images, chunk):
            numbers = range(first, min(first + chunk, images))
            wanted: dict[int, list[int]] = {}
            for p, i in pairs:
                if i in numbers:
                    wanted.setdefault(p, []).append(i)
            if not wanted:
                continue
            walk = _Walk(self, {i: load(i) for i in sorted({i for all_of in wanted.values() for i in all_of})})
            for p in sorted(wanted, key=lambda number: starts[number]):
                walk.advance(starts[p])
                for i, raw in walk.outputs(placements[p], wanted[p]):
                    report(p, i, self._distance(walk.teacher[i], raw))
                    done += 1
                    if progress:
                        progress("sensitivity", done, total)

    def _start(self, placement: Placement) -> int:
        """Position of the first node that a placement changes."""
        return min((self.position[name] for group in placement.int8 for name in self.nodes_of[group]), default=0)

    def _distance(self, teacher: RawOutputs, student: RawOutputs) -> float:
        return float(distances(teacher, student, self.activation, by_identity=self.by_identity)[0])


class _Walk:
    """Some images on their way through the float graph."""

    def __init__(self, meter: DistanceMeter, images: dict[int, np.ndarray]) -> None:
        self._meter, self._cuts, self._at = meter, meter._cuts, 0
        session = GraphSession(meter.graph.model, OUTPUTS, optimize=True, integers=False)
        self._values: dict[int, Values] = {i: {"images": batch} for i, batch in images.items()}
        self.teacher = {i: _raw(session.run({"images": batch})) for i, batch in images.items()}
        meter.cost.forwards += len(images)
        meter.cost.whole += len(images)

    def advance(self, position: int) -> None:
        """Compute what is read from `position` on."""
        if position <= self._at:
            return
        before, after = self._cuts.live(self._at), self._cuts.live(position)
        new = sorted(after - before)
        if new:
            part = submodel(self._meter.graph, self._meter.graph.model, before, new)
            session = GraphSession(part, new, optimize=True, integers=False)
            inputs = [item.name for item in part.graph.input]
            for values in self._values.values():
                values.update(session.run({name: values[name] for name in inputs}))
        for values in self._values.values():
            for name in values.keys() - after:
                del values[name]
        self._meter.cost.forwards += len(self._values) * self._cuts.share(self._at, position)
        self._at = position

    def outputs(self, placement: Placement, images: Sequence[int]) -> list[tuple[int, RawOutputs]]:
        """What a placement gives on some of the images; its first node is at or behind the cut."""
        meter = self._meter
        model = quantized_model(meter.graph, meter.policy, placement, meter.ranges, meter.target)
        part = submodel(meter.graph, model, self._cuts.live(self._at), OUTPUTS) if self._at else model
        session = GraphSession(part, OUTPUTS, optimize=True, integers=False)
        inputs = [item.name for item in part.graph.input]
        meter.cost.forwards += len(images) * self._cuts.share(self._at, None)
        meter.cost.whole += len(images)
        return [(i, _raw(session.run({name: self._values[i][name] for name in inputs}))) for i in images]


class _Cuts:
    """Which tensors cross a cut before a node, and how much of the work lies between two cuts."""

    def __init__(self, graph: GraphIndex) -> None:
        self._made = dict.fromkeys(graph.inputs, -1)
        self._read: dict[str, int] = {}
        for number, node in enumerate(graph.nodes):
            for name in node.output:
                self._made[name] = number
            for name in node.input:
                if name in self._made:
                    self._read[name] = number
        self._read |= dict.fromkeys(graph.outputs, len(graph.nodes))
        work = {node.name: float(macs(node, graph)) for node in weighted_nodes(graph)}
        self._done = np.concatenate([[0.0], np.cumsum([work.get(node.name, 0.0) for node in graph.nodes])])
        self._sizes = {name: _bytes(graph, name) for name in self._made}

    def live(self, position: int) -> set[str]:
        """Tensors that are made before a node and read by it or a later one."""
        return {name for name, made in self._made.items() if made < position <= self._read.get(name, -1)}

    @property
    def most_bytes(self) -> int:
        """Bytes of one image's tensors at the largest cut."""
        change = np.zeros(len(self._done) + 1)
        for name, made in self._made.items():
            change[made + 1] += self._sizes[name]
            change[max(self._read.get(name, made), made) + 1] -= self._sizes[name]
        return int(np.cumsum(change).max())

    def share(self, start: int, end: int | None) -> float:
        """Part of the whole graph's multiply-accumulates between two cuts; None = the end."""
        return float((self._done[-1 if end is None else end] - self._done[start]) / max(self._done[-1], 1.0))


def submodel(graph: GraphIndex, model: ModelProto, inputs: set[str], outputs: Sequence[str]) -> ModelProto:
    """The part of a model from some of its inner tensors to others.

    graph    of the float model, for types and shapes; `model` may be a quantized form of it
    inputs   where the part begins; those that it does not need are left out
    """
    result = ModelProto()
    result.CopyFrom(model)
    replace_nodes(result, [node for node in model.graph.node if not inputs & set(node.output)])
    del result.graph.input[:], result.graph.output[:]
    result.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    prune(result)
    read = {name for node in result.graph.node for name in node.input}
    for name in sorted(read & inputs):
        kind = graph.types.get(name, TensorProto.FLOAT)
        result.graph.input.append(helper.make_tensor_value_info(name, kind, _open_batch(graph.shape(name))))
    return result


def _open_batch(shape: Sequence[int | None] | None) -> list[int | str | None] | None:
    return None if shape is None else list(shape)


def _bytes(graph: GraphIndex, name: str) -> int:
    return 4 * math.prod(size or 1 for size in graph.shape(name) or [1])


def _raw(values: Values) -> RawOutputs:
    return RawOutputs(values["logits"], values["boxes"])
