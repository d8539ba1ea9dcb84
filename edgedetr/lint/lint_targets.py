"""The targets that lint checks a graph for: the names of `edgedetr lint --target`, each with its oldest TensorRT."""

from __future__ import annotations

from dataclasses import dataclass

from edgedetr.errors import UsageError, did_you_mean
from edgedetr.lint.operator_table import OperatorTable, operator_table


@dataclass(frozen=True)
class Target:
    """Where an engine is to be built.

    name          on the command line
    tensorrt      the oldest TensorRT (major, minor) that the target covers
    description   for messages
    rtx           TensorRT-RTX instead of TensorRT
    """

    name: str
    tensorrt: tuple[int, int]
    description: str
    rtx: bool = False

    @property
    def table(self) -> OperatorTable:
        """The operators that its parser reads."""
        return operator_table(self.tensorrt, rtx=self.rtx)


TARGETS = {
    target.name: target
    for target in (
        Target("jetpack-6", (10, 3), "JetPack 6.1 and 6.2, TensorRT 10.3"),
        Target("jetpack-7.0", (10, 13), "JetPack 7.0, TensorRT 10.13"),
        Target("jetpack-7.1", (10, 13), "JetPack 7.1, TensorRT 10.13"),
        Target("jetpack-7.2", (10, 16), "JetPack 7.2, TensorRT 10.16"),
        Target("trt-11", (11, 0), "TensorRT 11"),
    )
}
# Engines are not built for it: NVIDIA's parser that runs without a GPU, against which lint is tested.
RTX = Target("rtx-1.7", (11, 4), "TensorRT-RTX 1.7", rtx=True)


def target(name: str) -> Target:
    """Errors: UsageError for an unknown name."""
    if name == RTX.name:
        return RTX
    if name not in TARGETS:
        raise UsageError(f"target is {name!r}; expected one of {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]
