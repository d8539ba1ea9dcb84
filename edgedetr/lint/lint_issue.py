"""The records of lint: a rule, an issue that a rule finds for one target, and a finding merged over the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from onnx import NodeProto

from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.index import GraphIndex, display_name

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class LintIssue:
    """One problem of one node or tensor, for one target. An error stops the build or makes the engine wrong.

    source   where the claim can be read, where that is not the rule's own source
    """

    node: str
    reason: str
    fix: str
    severity: Severity = "error"
    source: str = ""


@dataclass(frozen=True)
class LintRule:
    """A named check of a whole graph; `source` is where its claim can be read.

    by_target   whether the result depends on the target; if not, the check runs once for all of them
    """

    id: str
    check: Callable[[GraphIndex, Target], Iterable[LintIssue]]
    source: str
    by_target: bool = False


@dataclass(frozen=True)
class LintFinding:
    """An issue with its rule, merged over the targets that it concerns: `severity` by target name."""

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


def node_issue(node: NodeProto, reason: str, fix: str, severity: Severity = "error", source: str = "") -> LintIssue:
    return LintIssue(display_name(node), reason, fix, severity, source)
