"""What lint says: a fault of one node for one TensorRT, and the same merged over all that were asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from onnx import NodeProto

from edgedetr.lint.operator_table import OperatorTable, operator_table
from edgedetr.onnx_graph.index import GraphIndex, display_name

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Target:
    """Where an engine is to be built: the name on the command line, and the oldest TensorRT that it stands for."""

    name: str
    tensorrt: tuple[int, int]
    words: str
    rtx: bool = False

    @property
    def table(self) -> OperatorTable:
        """The operators that its parser reads."""
        return operator_table(self.tensorrt, rtx=self.rtx)


TARGETS = {
    "jetpack-6": Target("jetpack-6", (10, 3), "JetPack 6.1 and 6.2, TensorRT 10.3"),
    "jetpack-7.0": Target("jetpack-7.0", (10, 13), "JetPack 7.0, TensorRT 10.13"),
    "jetpack-7.1": Target("jetpack-7.1", (10, 13), "JetPack 7.1, TensorRT 10.13"),
    "jetpack-7.2": Target("jetpack-7.2", (10, 16), "JetPack 7.2, TensorRT 10.16"),
    "trt-11": Target("trt-11", (11, 0), "TensorRT 11"),
}
# No place to build an engine for; NVIDIA's parser that runs here, on which lint is tested.
RTX = Target("rtx-1.7", (11, 4), "TensorRT-RTX 1.7", rtx=True)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong at one place, for one target. An error stops the build or makes the engine wrong.

    source   where the claim can be read, where that is not what the rule names
    """

    node: str
    reason: str
    fix: str
    severity: Severity = "error"
    source: str = ""


@dataclass(frozen=True)
class Rule:
    """A named check of a whole graph; `source` is where its claim can be read.

    by_target   whether what it says depends on the target; if not, it looks once for all of them
    """

    id: str
    check: Callable[[GraphIndex, Target], Iterable[Fault]]
    source: str
    by_target: bool = False


@dataclass(frozen=True)
class Finding:
    """A fault with its rule; `severity` by target name, for the targets that it concerns."""

    rule: str
    node: str
    reason: str
    fix: str
    source: str
    severity: dict[str, Severity] = field(default_factory=dict)

    @property
    def worst(self) -> Severity:
        return "error" if "error" in self.severity.values() else "warning"

    def __str__(self) -> str:
        return f"{self.node}: {self.reason} [{self.rule}]; {self.fix}"


def at(node: NodeProto, reason: str, fix: str, severity: Severity = "error", source: str = "") -> Fault:
    """A fault of a node."""
    return Fault(display_name(node), reason, fix, severity, source)
