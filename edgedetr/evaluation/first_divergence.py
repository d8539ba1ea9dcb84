"""Find the first node of a graph whose values on a backend differ from those of a reference run.

The reference run is ONNX Runtime without optimizations, which computes every node as it is written. Tensors are exposed
as extra outputs, a group at a time, because an exposed tensor also keeps the backend from fusing nodes across it. From
the first wrong tensor the search continues among its ancestors, until a node has correct inputs and a wrong output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.errors import MissingDependency, UsageError
from edgedetr.onnx_graph.fp16_simulation import simulate_fp16
from edgedetr.packages import missing
from edgedetr.runtime.backends import base, onnxruntime
from edgedetr.runtime.sqnr import sqnr_db

GROUP = 12  # tensors exposed at a time
SQNR_FLOOR = 20.0  # dB; different rounding leaves 25 or more, broken kernels were measured at 1 to 6

SHARP_DROP = 8.0  # dB from a node's inputs to its output; OpenVINO's known faults were drops of 28 to 33

Tensors = Callable[[bytes, np.ndarray, Sequence[str]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Divergence:
    """A node with correct inputs and a wrong output; `inputs_db` is the lowest SQNR of its inputs."""

    node: str
    operator: str
    tensor: str
    sqnr_db: float
    inputs_db: float

    def __str__(self) -> str:
        return (
            f"{self.operator} {self.node!r}: {self.sqnr_db:.1f} dB against the reference run, "
            f"its inputs {self.inputs_db:.1f} dB or better"
        )


def find_first_divergence(
    model: str | Path,
    backend: str,
    images: np.ndarray,
    *,
    floor: float = SQNR_FLOOR,
    threads: int | None = None,
    until_selection: bool = False,
) -> Divergence | None:
    """The first node at which `backend` differs from the reference run, or None where logits and boxes agree.

    model    an ONNX file
    backend  the name of a backend that can read tensors; ONNX Runtime is compared with optimized kernels
    images   [B, 3, H, W] float32, a few preprocessed images
    until_selection   compare nothing that depends on a TopK: where two scores are nearly equal, rounding may exchange
                      two queries, and each later tensor differs without a fault
    """
    tensors = base.get(backend).tensors
    if tensors is None:
        able = ", ".join(known.name for known in base.backends() if known.tensors is not None)
        raise UsageError(f"backend is {backend!r}, which cannot read tensors inside a graph; expected one of {able}")

    def run(model: bytes, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        return tensors(model, images, names, threads=threads)

    return search(Path(model), run, images, floor=floor, threads=threads, until_selection=until_selection)


def find_sharp_divergence(
    model: str | Path, backend: str, images: np.ndarray, *, threads: int | None = None
) -> Divergence | None:
    """The first node at which `backend` loses SHARP_DROP or more, before the selection of queries; None without one.

    Rounding that falls to the other side adds up over many layers of an INT8 graph, until a node is below the floor
    that computes nothing wrong by itself. Arguments are those of `find_first_divergence`.
    """
    floor = SQNR_FLOOR
    while True:
        found = find_first_divergence(model, backend, images, floor=floor, threads=threads, until_selection=True)
        if found is None or found.inputs_db - found.sqnr_db >= SHARP_DROP:
            return found
        floor = found.sqnr_db - SHARP_DROP


def search(
    model: Path,
    run: Tensors,
    images: np.ndarray,
    *,
    floor: float = SQNR_FLOOR,
    threads: int | None = None,
    until_selection: bool = False,
) -> Divergence | None:
    """As find_first_divergence, for any function that runs a serialized model and returns named tensors."""
    graph = _Graph(model, run, images, threads)
    ends = graph.until_selection() if until_selection else graph.outputs
    graph.measure(ends)
    bad = next((name for name in ends if graph.sqnr[name] < floor), None)
    if bad is None:
        return None
    while True:
        unknown = [name for name in graph.ancestors(bad) if name not in graph.sqnr]
        parents = graph.parents(bad)
        worse = next((p for p in parents if graph.sqnr.get(p, np.inf) < floor), None)
        if worse is not None:
            bad = worse
            continue
        if not [p for p in parents if p not in graph.sqnr]:
            return graph.divergence(bad, parents)
        # The parents, and samples of everything before them: a long graph shrinks by a factor of GROUP each time.
        first = [p for p in parents if p not in graph.sqnr][: GROUP // 2]
        samples = [unknown[int(i)] for i in np.linspace(0, len(unknown) - 1, GROUP - len(first))]
        group = sorted({*first, *samples}, key=graph.order.__getitem__)
        graph.measure(group)
        bad = next((name for name in group if graph.sqnr[name] < floor), bad)


class _Graph:
    """The model and the `sqnr` of the tensors measured so far; `order` and producers of all float tensors."""

    def __init__(self, model: Path, run: Tensors, images: np.ndarray, threads: int | None) -> None:
        try:
            import onnx

            from edgedetr.onnx_graph.infer import infer_types
        except ImportError as error:
            raise MissingDependency(missing("onnx", error)) from error
        self.onnx, self.run, self.images, self.threads = onnx, run, images, threads
        # In float32, so that all tensors can be compared; the rounding of FP16 is far above the floor in dB.
        self.model = onnx.load_from_string(simulate_fp16(model, rounded=False))
        graph = self.model.graph
        self.outputs = [output.name for output in graph.output]
        self.producer = {name: node for node in graph.node for name in node.output}
        self.types = infer_types(self.model).types
        nodes = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")]
        floats = [name for node in nodes for name in node.output if self.types.get(name) == onnx.TensorProto.FLOAT]
        self.order = {name: number for number, name in enumerate(floats)}
        self.sqnr: dict[str, float] = {}

    def parents(self, name: str) -> list[str]:
        """The nearest float tensors before the producer of `name`, through Q, DQ and constants."""
        found: dict[str, None] = {}
        waiting, seen = list(self.producer[name].input), set()
        while waiting:
            current = waiting.pop()
            if current in seen or current not in self.producer:
                continue
            seen.add(current)
            if current in self.order:
                found[current] = None
            else:
                waiting.extend(self.producer[current].input)
        return list(found)

    def until_selection(self) -> list[str]:
        """The last float tensors that depend on no TopK; the outputs where there is none."""
        behind: set[str] = set()
        ends: dict[str, None] = {}
        for node in self.model.graph.node:
            if node.op_type == "TopK" or any(name in behind for name in node.input):
                behind.update(node.output)
                ends.update(dict.fromkeys(name for name in node.input if name in self.order and name not in behind))
        return [*ends, *(name for name in self.outputs if name not in behind)]

    def ancestors(self, name: str) -> list[str]:
        """All float tensors that `name` depends on, in the order of the graph."""
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for parent in self.parents(waiting.pop()):
                if parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
        return sorted(seen, key=self.order.__getitem__)

    def measure(self, names: Sequence[str]) -> None:
        """Run the model once on both and fill in `sqnr` of these tensors."""
        model: Any = self.onnx.ModelProto()
        model.CopyFrom(self.model)
        present = set(self.outputs)
        for name in names:
            if name not in present:
                kind = self.onnx.TensorProto.FLOAT
                model.graph.output.append(self.onnx.helper.make_tensor_value_info(name, kind, None))
        data = model.SerializeToString()
        reference = onnxruntime.tensors(data, self.images, names, optimize=False, threads=self.threads)
        other = self.run(data, self.images, names)
        self.sqnr.update({name: sqnr_db(reference[name], other[name]) for name in names})

    def divergence(self, tensor: str, parents: Sequence[str]) -> Divergence:
        node = self.producer[tensor]
        return Divergence(
            node.name or tensor,
            node.op_type,
            tensor,
            self.sqnr[tensor],
            min((self.sqnr[p] for p in parents), default=float("inf")),
        )
