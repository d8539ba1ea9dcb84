"""Lint: what a TensorRT would refuse, compute wrongly or run slowly in an ONNX graph, found without a GPU.

The rules are in `edgedetr.lint.rules`; they cover what was documented or observed. A graph without findings may still
fail to build: `edgedetr.lint.rtx` tries a real parser and builder, and the device itself decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from onnx import ModelProto

from edgedetr.artifacts import BY_FILE, TENSORRT, frame_graph
from edgedetr.errors import ExportError
from edgedetr.lint.lint_issue import LintFinding, LintIssue
from edgedetr.lint.lint_targets import TARGETS, target
from edgedetr.lint.rules import RULES
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.io import open_onnx

SHOWN = 3  # reasons of one rule in the table and in an error; further ones are counted


@dataclass(frozen=True)
class LintReport:
    """The findings in one file."""

    path: str
    targets: tuple[str, ...]
    nodes: int
    findings: tuple[LintFinding, ...]

    @property
    def errors(self) -> int:
        return sum(finding.worst == "error" for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "errors": self.errors, "warnings": len(self.findings) - self.errors}

    def rows(self, shown: int = SHOWN) -> list[list[object]]:
        """severity, rule, targets, node, reason. Errors first; nodes with the same reason are one row.

        A target in parentheses has a warning where the others have an error.
        shown   reasons listed for one rule
        """
        by_reason: dict[tuple[str, str], list[LintFinding]] = {}
        for finding in sorted(self.findings, key=lambda item: item.worst != "error"):
            by_reason.setdefault((finding.rule, finding.reason), []).append(finding)
        reasons: Counter[str] = Counter()
        lines: list[list[object]] = []
        for (rule, reason), same in by_reason.items():
            reasons[rule] += 1
            if reasons[rule] > shown:
                continue
            first = same[0]
            names = " ".join(name if kind == first.worst else f"({name})" for name, kind in first.severity.items())
            node = first.node + (f" (and {len(same) - 1} more)" if len(same) > 1 else "")
            lines.append([first.worst, rule, names, node, reason])
        hidden = {rule: count - shown for rule, count in reasons.items() if count > shown}
        return lines + [["", rule, "", f"({count} other reasons of this rule)", ""] for rule, count in hidden.items()]

    def fixes(self) -> dict[str, str]:
        """What to do, by rule, with the source of the rule's claim."""
        return {finding.rule: f"{finding.fix} ({finding.source})" for finding in reversed(self.findings)}


def lint(model: ModelProto, targets: Iterable[str] = tuple(TARGETS)) -> tuple[LintFinding, ...]:
    """Every finding in a graph, in the order of the rules; an issue of several targets is one finding."""
    graph = GraphIndex(model)
    merged: dict[tuple[str, str, str], LintFinding] = {}
    for_all_targets: dict[str, tuple[LintIssue, ...]] = {}
    for name in targets:
        for rule in RULES:
            issues = for_all_targets.get(rule.id)
            if issues is None:
                issues = tuple(rule.check(graph, target(name)))
                for_all_targets.update({} if rule.by_target else {rule.id: issues})
            for issue in issues:
                key = rule.id, issue.node, issue.reason
                finding = merged.setdefault(
                    key, LintFinding(rule.id, issue.node, issue.reason, issue.fix, issue.source or rule.source)
                )
                finding.severity[name] = issue.severity
    order = {rule.id: number for number, rule in enumerate(RULES)}
    return tuple(sorted(merged.values(), key=lambda finding: order[finding.rule]))


def lint_file(path: str | Path, targets: Sequence[str] = tuple(TARGETS)) -> LintReport:
    """Lint one file; ExportError when it is no ONNX file."""
    opened = open_onnx(path)
    findings = [
        finding for finding in lint(opened.model, targets) if finding.rule != "external-data" or not opened.faults
    ]
    source = next(rule.source for rule in RULES if rule.id == "external-data")
    findings[:0] = [
        LintFinding(
            "external-data",
            opened.path.name,
            fault,
            "put the data file next to the model, as a plain file, and name it without a path",
            source,
            dict.fromkeys(targets, "error"),
        )
        for fault in opened.faults
    ]
    return LintReport(str(path), tuple(targets), len(opened.model.graph.node), tuple(findings))


def require_no_errors(model: ModelProto, name: str) -> None:
    """The gate before a graph for TensorRT is written. Errors: ExportError with the first lint errors.

    name   of the graph, for the message
    """
    errors = [finding for finding in lint(model) if finding.worst == "error"]
    if errors:
        first = "; ".join(str(finding) for finding in errors[:SHOWN])
        raise ExportError(
            f"{name} has {len(errors)} lint error{'s' * (len(errors) > 1)} for TensorRT: {first}. It was not written; "
            "edgedetr lint BUNDLE checks the graphs it was made from, and a policy with fewer INT8 or FP16 nodes may "
            "pass"
        )


def for_tensorrt(names: Iterable[str]) -> list[str]:
    """Those of a bundle's files that engines are built from: graphs and frame graphs, except in the form for CPUs."""
    found = []
    for name in names:
        frame = frame_graph(name)
        artifact = frame.source if frame else BY_FILE.get(name)
        if artifact is not None and artifact.is_graph and TENSORRT in artifact.backends:
            found.append(name)
    return found
