"""Lint: what in an ONNX graph a TensorRT would refuse, get wrong or run slowly, found without a GPU.

The rules are in `edgedetr.lint.rules`. They know what has been seen and documented; a clean file may still fail to
build, which `edgedetr.lint.rtx` (a real parser) and the device itself say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from onnx import ModelProto

from edgedetr.errors import UsageError, did_you_mean
from edgedetr.lint.lint_issue import RTX, TARGETS, Fault, Finding, Target
from edgedetr.lint.rules import RULES
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.io import open_onnx

SHOWN = 3  # reasons of one rule that the table names; the others are counted
# Graphs of a bundle that are not made for TensorRT.
_FOR_CPU = "-cpu.onnx", "-openvino.onnx"


@dataclass(frozen=True)
class Report:
    """What lint found in one file."""

    path: str
    targets: tuple[str, ...]
    nodes: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        return sum(finding.worst == "error" for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "errors": self.errors, "warnings": len(self.findings) - self.errors}

    def rows(self, shown: int = SHOWN) -> list[list[object]]:
        """severity, rule, targets, node, reason; errors first, findings of one reason together, the first few reasons.

        A target in brackets takes as a warning what is an error for the others.
        """
        alike: dict[tuple[str, str], list[Finding]] = {}
        for finding in sorted(self.findings, key=lambda item: item.worst != "error"):
            alike.setdefault((finding.rule, finding.reason), []).append(finding)
        told: Counter[str] = Counter()
        lines: list[list[object]] = []
        for (rule, reason), same in alike.items():
            told[rule] += 1
            if told[rule] > shown:
                continue
            first = same[0]
            words = " ".join(name if kind == first.worst else f"({name})" for name, kind in first.severity.items())
            node = first.node + (f" (and {len(same) - 1} more)" if len(same) > 1 else "")
            lines.append([first.worst, rule, words, node, reason])
        hidden = {rule: count - shown for rule, count in told.items() if count > shown}
        return lines + [["", rule, "", f"({count} other reasons of this rule)", ""] for rule, count in hidden.items()]

    def fixes(self) -> dict[str, str]:
        """What to do, by rule, with the place where its claim can be read."""
        return {finding.rule: f"{finding.fix} ({finding.source})" for finding in reversed(self.findings)}


def lint(model: ModelProto, targets: Iterable[str] = tuple(TARGETS)) -> tuple[Finding, ...]:
    """Every finding in a graph, in the order of the rules; one that concerns several targets is one finding."""
    graph = GraphIndex(model)
    merged: dict[tuple[str, str, str], Finding] = {}
    once: dict[str, tuple[Fault, ...]] = {}
    for name in targets:
        target = _target(name)
        for rule in RULES:
            faults = once.get(rule.id)
            if faults is None:
                faults = tuple(rule.check(graph, target))
                once.update({} if rule.by_target else {rule.id: faults})
            for fault in faults:
                key = rule.id, fault.node, fault.reason
                finding = merged.setdefault(
                    key, Finding(rule.id, fault.node, fault.reason, fault.fix, fault.source or rule.source)
                )
                finding.severity[name] = fault.severity
    order = {rule.id: number for number, rule in enumerate(RULES)}
    return tuple(sorted(merged.values(), key=lambda finding: order[finding.rule]))


def lint_file(path: str | Path, targets: Sequence[str] = tuple(TARGETS)) -> Report:
    """Lint one file; ExportError when it is no ONNX file."""
    opened = open_onnx(path)
    findings = [
        finding for finding in lint(opened.model, targets) if finding.rule != "external-data" or not opened.faults
    ]
    source = next(rule.source for rule in RULES if rule.id == "external-data")
    findings[:0] = [
        Finding(
            "external-data",
            opened.path.name,
            fault,
            "put the data file beside the model, as a plain file, and name it without a path",
            source,
            dict.fromkeys(targets, "error"),
        )
        for fault in opened.faults
    ]
    return Report(str(path), tuple(targets), len(opened.model.graph.node), tuple(findings))


def for_tensorrt(names: Iterable[str]) -> list[str]:
    """Those files of a bundle that engines are built from."""
    return [name for name in names if name.endswith(".onnx") and not name.endswith(_FOR_CPU)]


def _target(name: str) -> Target:
    if name == RTX.name:
        return RTX
    if name not in TARGETS:
        raise UsageError(f"target is {name!r}; expected one of {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]
