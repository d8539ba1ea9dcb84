"""Known patterns at which INT8 goes wrong, read from calib/patterns/known.toml, and whether one is around a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from onnx import NodeProto

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex, int_attribute, ints_attribute, string_attribute
from edgedetr.package_data import patterns_file
from edgedetr.quantization.policy import PolicyRule, rules_of
from edgedetr.storage.reading import read_toml

SHORT = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
STEPS_DOWN = 3  # nodes behind the found one in the text of its surroundings


@dataclass(frozen=True)
class Step:
    """One edit of a cure (cures.EDITS), at a node of the pattern's chain, from 0."""

    edit: str
    node: int


@dataclass(frozen=True)
class Pattern:
    """One entry of calib/patterns/known.toml, which explains the fields.

    rules   the layers that --cure keeps float; none where the cure is something else
    steps   the edits with which export cures a quantized graph; none where it keeps the layers of `rules` float
    """

    name: str
    kind: str
    chain: tuple[str, ...]
    at: int
    evidence: str
    cure: str
    backends: tuple[str, ...] = ()
    unequal_ranges: float = 0.0
    saturated: float = 0.0
    rewritten: bool = False
    signed: bool = False
    asymmetric: bool = False
    zero_padding: bool = False
    rules: tuple[PolicyRule, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def curable(self) -> bool:
        """Whether export knows how to cure it."""
        return bool(self.steps or self.rules)


@dataclass(frozen=True)
class Measured:
    """What was measured around a node, for the conditions of a pattern.

    backend          where the values differ from the reference run; "" for what quantization itself loses
    unequal_ranges   largest over smallest magnitude of a Concat's branches; 1 for other nodes
    saturated        share of the values outside of the range, 0..1
    rewritten        DequantizeLinear has another scale or zero point than QuantizeLinear
    """

    backend: str = ""
    unequal_ranges: float = 1.0
    saturated: float = 0.0
    rewritten: bool = False


@cache
def patterns() -> tuple[Pattern, ...]:
    """All known patterns, in the order of the file."""
    path = patterns_file()
    return tuple(_pattern(entry, str(path)) for entry in read_toml(path, ExportError)["pattern"])


def _pattern(entry: dict[str, Any], where: str) -> Pattern:
    rules = rules_of({"float": entry.pop("float", [])}, "float", where)
    steps = tuple(Step(**step) for step in entry.pop("step", []))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Pattern(**{**values, "rules": rules, "steps": steps})


def matching(graph: GraphIndex, node: NodeProto, measured: Measured) -> list[Pattern]:
    """The known patterns that are around a node of a quantized graph."""
    kind = "backend" if measured.backend else "quantization"
    return [
        pattern
        for pattern in patterns()
        if pattern.kind == kind
        and (not pattern.backends or measured.backend in pattern.backends)
        and measured.unequal_ranges >= pattern.unequal_ranges
        and measured.saturated >= pattern.saturated
        and measured.rewritten >= pattern.rewritten
        and place(graph, node, pattern) is not None
    ]


def place(graph: GraphIndex, node: NodeProto, pattern: Pattern) -> tuple[NodeProto, ...] | None:
    """The nodes of a pattern's chain around a node, in the order of the chain; None where the pattern is not there."""
    before, behind = pattern.chain[pattern.at :: -1], pattern.chain[pattern.at :]
    for first in _paths(graph, node, before, up=True):
        for second in _paths(graph, node, behind, up=False):
            found = (*first[::-1], *second[1:])
            pairs = [one for one in found if one.op_type in SHORT]
            if pattern.signed and not all(_is_signed(one, graph) for one in pairs):
                continue
            if pattern.asymmetric and not all(_is_asymmetric(one, graph) for one in pairs):
                continue
            if pattern.zero_padding and not any(_pads_with_zeros(one, graph) for one in found):
                continue
            return found
    return None


def _is_signed(node: NodeProto, graph: GraphIndex) -> bool:
    """Whether the zero point of a Q or DQ is int8."""
    zero = _zero_point(node, graph)
    return zero is not None and zero.dtype == np.int8


def _is_asymmetric(node: NodeProto, graph: GraphIndex) -> bool:
    """Whether the zero point of a Q or DQ is not 0."""
    zero = _zero_point(node, graph)
    return zero is not None and bool(np.any(zero))


def _zero_point(node: NodeProto, graph: GraphIndex) -> np.ndarray | None:
    return graph.value(node.input[2]) if len(node.input) > 2 else None


def _pads_with_zeros(node: NodeProto, graph: GraphIndex) -> bool:
    """Whether a Pad adds zeros, or an AveragePool counts zeros around its input."""
    if node.op_type == "AveragePool":
        same = string_attribute(node, "auto_pad", "NOTSET").startswith("SAME")
        return bool(int_attribute(node, "count_include_pad", 0)) and (same or any(ints_attribute(node, "pads")))
    if node.op_type != "Pad" or string_attribute(node, "mode", "constant") != "constant":
        return False
    value = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return value is None or not np.any(value)


def _paths(graph: GraphIndex, node: NodeProto, chain: tuple[str, ...], *, up: bool) -> Iterator[tuple[NodeProto, ...]]:
    """The paths from the node that have these operators."""
    if chain[0] != "*" and node.op_type not in chain[0].split("|"):
        return
    if len(chain) == 1:
        yield (node,)
        return
    for other in _before(graph, node) if up else _after(graph, node):
        for path in _paths(graph, other, chain[1:], up=up):
            yield (node, *path)


def _before(graph: GraphIndex, node: NodeProto) -> Iterator[NodeProto]:
    for name in node.input:
        if name in graph.producers:
            yield graph.producers[name]


def _after(graph: GraphIndex, node: NodeProto) -> Iterator[NodeProto]:
    for name in node.output:
        for consumer in graph.consumers.get(name, []):
            yield consumer.node


def surroundings(graph: GraphIndex, node: NodeProto) -> str:
    """The operators around a node in one line of text: "Resize, Conv -> Concat -> Q -> DQ -> Conv"."""
    parts = [_operators(_before(graph, node))] if any(True for _ in _before(graph, node)) else []
    parts.append(_operators([node]))
    current = [node]
    for _ in range(STEPS_DOWN):
        current = [other for one in current for other in _after(graph, one)]
        if not current:
            break
        parts.append(_operators(current))
    return " -> ".join(parts)


def _operators(nodes: Any) -> str:
    return ", ".join(dict.fromkeys(SHORT.get(node.op_type, node.op_type) for node in nodes))
