"""Known patterns at which INT8 goes wrong, read from calib/patterns/known.toml, and whether one is around a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from onnx import NodeProto

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.package_data import patterns_file
from edgedetr.quantization.policy import PolicyRule, rules_of
from edgedetr.storage.reading import read_toml

SHORT = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
STEPS_DOWN = 3  # nodes behind the found one in a picture


@dataclass(frozen=True)
class Pattern:
    """One entry of calib/patterns/known.toml, which explains the fields.

    rules   the layers that --cure keeps float; none where the cure is something else
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
    rules: tuple[PolicyRule, ...] = ()


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
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Pattern(**{**values, "rules": rules})


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
        and _fits(graph, node, pattern.chain, pattern.at)
    ]


def _fits(graph: GraphIndex, node: NodeProto, chain: tuple[str, ...], at: int) -> bool:
    return _leads(graph, node, chain[at::-1], up=True) and _leads(graph, node, chain[at:], up=False)


def _leads(graph: GraphIndex, node: NodeProto, chain: tuple[str, ...], *, up: bool) -> bool:
    """Whether some path from the node has these operators; an operator that must be there may have moves before it."""
    if chain[0] != "*" and node.op_type not in chain[0].split("|"):
        return False
    if len(chain) == 1:
        return True
    following = _before(graph, node) if up else _after(graph, node)
    return any(_leads(graph, other, chain[1:], up=up) for other in following)


def _before(graph: GraphIndex, node: NodeProto) -> Iterator[NodeProto]:
    for name in node.input:
        if name in graph.producers:
            yield graph.producers[name]


def _after(graph: GraphIndex, node: NodeProto) -> Iterator[NodeProto]:
    for name in node.output:
        for consumer in graph.consumers.get(name, []):
            yield consumer.node


def picture(graph: GraphIndex, node: NodeProto) -> str:
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
