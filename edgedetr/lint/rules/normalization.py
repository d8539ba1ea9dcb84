"""Find LayerNormalization that is written out in other operators, by its result and not by a pattern of nodes.

Around every square root of an average, the subgraph is evaluated on random numbers and compared with
LayerNormalization over the last axes, with any scale and bias per element of these axes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.evaluate_node import OPERATORS, evaluate
from edgedetr.onnx_graph.index import GraphIndex, int_attribute

_NORMALIZING = ("InstanceNormalization", "GroupNormalization")
_PASSING = ("Cast", "Identity", "Mul", "Pow", "Abs", "Sub", "Reshape")
_MOST = 1 << 18  # elements of one evaluation
_BEFORE, _AFTER = 24, 8  # nodes that are evaluated on either side of a root
_ROWS = 6  # of random numbers, at least: any two points are on a straight line
_CLOSE = 1e-3  # relative to the spread of the values; an epsilon of 1e-5 changes them by less


def written_out_layer_norm(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.cached("layer norms", lambda: find_layer_norms(graph)):
        yield node_issue(
            node,
            "LayerNormalization is written out; in FP16 its square has overflowed to no detections",
            "export at opset 17 or later, where it is one operator that keeps its sums in float32",
            "warning",
        )


def find_layer_norms(graph: GraphIndex) -> list[NodeProto]:
    """The root, or the other normalization operator, of every LayerNormalization that is written out."""
    return [node for node in graph.nodes if _is_root(graph, node) and _computes_layer_norm(graph, node)]


def _is_root(graph: GraphIndex, node: NodeProto) -> bool:
    if node.op_type == "Pow" and len(node.input) == 2:
        power = graph.folded(node.input[1])
        return power is not None and power.size == 1 and abs(float(power.reshape(-1)[0])) == 0.5
    if node.op_type in _NORMALIZING:  # over several channels or groups they compute something else
        shape = graph.shape(node.input[0]) if node.input else None
        return int_attribute(node, "num_groups", 0) == 1 or bool(shape and len(shape) > 1 and shape[1] == 1)
    return node.op_type == "Sqrt"


def _computes_layer_norm(graph: GraphIndex, root: NodeProto) -> bool:
    before, after = _nodes_before(graph, root), _nodes_after(graph, root)
    return any(_from(graph, name, before, after) for name in _sources(graph, root, before))


def _sources(graph: GraphIndex, root: NodeProto, before: list[NodeProto]) -> list[str]:
    """Tensors that may be the normalized one: inputs of averages, the nearest to the root first."""
    if root.op_type in _NORMALIZING:  # a single operator, possibly between two Reshapes
        return [
            name for node in before[::-1] if node is not root for name in node.input[:1] if graph.folded(name) is None
        ]
    averaged = [node.input[0] for node in before[::-1] if node.op_type.startswith("Reduce") and node.input]
    for name in averaged:
        producer = graph.producers.get(name)
        if producer is None or producer.op_type not in _PASSING or not producer.input:
            continue
        if producer.input[0] not in averaged:
            averaged.append(producer.input[0])
    return list(dict.fromkeys(averaged))


def _from(graph: GraphIndex, source: str, before: list[NodeProto], after: list[NodeProto]) -> bool:
    """Whether a tensor after the root is the LayerNormalization of `source`."""
    shape = graph.shape(source)
    if not shape or len(shape) < 2 or shape[-1] is None or shape[-1] < 2:
        return False
    sizes = [size or 2 for size in shape]
    few = [*(min(size, 3) for size in sizes[:-1]), sizes[-1]]
    # With fewer rows the result is the same, unless a constant or a Reshape fixes their number.
    if few != sizes and _is_layer_norm(graph, source, few, before, after):
        return True
    rigid = any(node.op_type in ("Reshape", "Expand", *_NORMALIZING) for node in (*before, *after)) or any(
        len(graph.constants[name].dims) > 1
        for node in (*before, *after)
        for name in node.input
        if name in graph.constants
    )
    return (few == sizes or rigid) and _is_layer_norm(graph, source, sizes, before, after)


def _is_layer_norm(
    graph: GraphIndex, source: str, sizes: list[int], before: list[NodeProto], after: list[NodeProto]
) -> bool:
    if np.prod(sizes, dtype=float) > _MOST:
        return False
    rows, rng = int(np.prod(sizes[:-1])), np.random.default_rng(0)
    tries = [_compute(graph, source, _numbers(rng, sizes), before, after) for _ in range(-(-_ROWS // rows))]
    made = [name for name in tries[0] if name != source and all(name in values for values in tries)]
    for last in range(1, len(sizes)):
        normal = np.stack([_layer_norm(values[source], last) for values in tries])
        if any(_same(np.stack([values[name] for values in tries]), normal, last) for name in made):
            return True
    return False


def _numbers(rng: np.random.Generator, sizes: list[int]) -> np.ndarray:
    """Random, with a mean and a spread that differ from row to row, so that neither is there by chance."""
    rows = (*sizes[:-1], 1)
    return rng.normal(size=sizes) * rng.uniform(0.5, 2, rows) + rng.normal(size=rows) * 2


def _compute(
    graph: GraphIndex, source: str, x: np.ndarray, before: list[NodeProto], after: list[NodeProto]
) -> dict[str, np.ndarray]:
    """Every tensor with as many elements as `x` that is computed from it and from constants."""
    values: dict[str, np.ndarray] = {source: x}
    for node in [*before, *after]:
        if node.output and node.output[0] not in values:
            read = [values.get(name, graph.folded(name)) if name else None for name in node.input]
            if any(name and value is None for name, value in zip(node.input, read)):
                continue
            wide = [value.astype(float) if value is not None and value.dtype.kind == "f" else value for value in read]
            result = evaluate(node, wide, rounded=False)
            if result is not None:
                values[node.output[0]] = result
    return {name: value for name, value in values.items() if value.size == x.size and value.dtype.kind == "f"}


def _layer_norm(x: np.ndarray, last: int) -> np.ndarray:
    axes = tuple(range(x.ndim - last, x.ndim))
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def _same(made: np.ndarray, normal: np.ndarray, last: int) -> bool:
    """Whether `made` is a linear function of `normal`, one for each element of the last axes."""
    columns = int(np.prod(normal.shape[-last:]))
    y, n = made.reshape(-1, columns), normal.reshape(-1, columns)
    if not np.isfinite(y).all():
        return False
    n0, y0 = n - n.mean(0), y - y.mean(0)
    slope = (n0 * y0).sum(0) / np.maximum((n0 * n0).sum(0), 1e-12)
    left, spread = np.abs(y0 - slope * n0).max(), np.abs(y0).max()
    if len(n) < 3:  # any two points are on a line: then the values themselves must be equal
        return bool(np.allclose(y, n, atol=_CLOSE))
    return bool(left <= _CLOSE * spread and spread > 0)


def _nodes_before(graph: GraphIndex, root: NodeProto) -> list[NodeProto]:
    """The root and the nodes before it that can be evaluated, each after those it reads."""
    found: dict[str, NodeProto] = {}
    waiting = deque([root])
    while waiting and len(found) < _BEFORE:
        node = waiting.popleft()
        if node.op_type in OPERATORS and node.output and node.output[0] not in found:
            found[node.output[0]] = node
            waiting.extend(graph.producers[name] for name in node.input if name in graph.producers)
    return sorted(found.values(), key=lambda node: graph.order[node.output[0]])


def _nodes_after(graph: GraphIndex, root: NodeProto) -> list[NodeProto]:
    """The root and the nodes after it that can be evaluated, with the other nodes these read, in the graph's order."""
    found: dict[str, NodeProto] = {}
    waiting = deque([root])
    while waiting and len(found) < _AFTER:
        node = waiting.popleft()
        if node.op_type in OPERATORS and node.output and node.output[0] not in found:
            found[node.output[0]] = node
            waiting.extend(consumer.node for consumer in graph.consumers[node.output[0]])
    for node in list(found.values()):
        for name in node.input:
            producer = graph.producers.get(name)
            if producer is not None and producer.op_type in OPERATORS and len(found) < 2 * _AFTER:
                found.setdefault(producer.output[0], producer)
    return sorted(found.values(), key=lambda node: graph.order[node.output[0]])
