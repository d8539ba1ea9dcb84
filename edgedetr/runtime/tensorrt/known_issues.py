"""Known issues of TensorRT versions with certain graphs or devices: the list is known_issues.json, with sources."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from edgedetr.runtime.onnx_bytes import OnnxFacts
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.gpu import version

DATA = Path(__file__).with_name("known_issues.json")


@dataclass(frozen=True)
class KnownIssue:
    """One issue and the conditions under which it affects an engine; an empty condition always holds.

    tensorrt      half-open ranges of versions [from, before)
    operators     the graph has at least one of them
    opset_from    the graph's opset is at least this
    sm            compute capability, 87 for 8.7
    batch_above   the largest batch is above this
    dynamic       the engine takes several batch sizes
    refuse        the engine would certainly be wrong, so none is built
    on_failure    shown only after a build has failed
    """

    id: str
    tensorrt: tuple[tuple[str, str], ...]
    text: str
    fix: str
    source: str
    operators: tuple[str, ...] = ()
    opset_from: int = 0
    sm: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    batch_above: int = 0
    dynamic: bool = False
    refuse: bool = False
    on_failure: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.fix} ({self.source})"

    def affects(self, facts: OnnxFacts, tensorrt: str, sm: int, arguments: BuildArguments) -> bool:
        here = version(tensorrt)
        return (
            any(version(first) <= here < version(before) for first, before in self.tensorrt)
            and (not self.operators or not facts.operators.isdisjoint(self.operators))
            and facts.opset >= self.opset_from
            and (not self.sm or sm in self.sm)
            and (not self.precisions or arguments.precision in self.precisions)
            and (not self.batch_above or arguments.batch[2] > self.batch_above)
            and (not self.dynamic or len(set(arguments.batch)) > 1)
        )


def affecting(facts: OnnxFacts, tensorrt: str, sm: int, arguments: BuildArguments) -> Sequence[KnownIssue]:
    """The issues that may affect an engine of this graph with these arguments on this device."""
    return [entry for entry in all_issues() if entry.affects(facts, tensorrt, sm, arguments)]


@lru_cache(maxsize=1)
def all_issues() -> tuple[KnownIssue, ...]:
    """The whole list."""
    return tuple(
        KnownIssue(
            **{
                **raw,
                "tensorrt": tuple((first, before) for first, before in raw["tensorrt"]),
                **{key: tuple(raw[key]) for key in ("operators", "sm", "precisions") if key in raw},
            }
        )
        for raw in json.loads(DATA.read_text(encoding="utf-8"))
    )
