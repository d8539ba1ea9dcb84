"""The policy: which nodes of a float graph are quantized, and why the others are not.

The rules are data (calib/policy/*.toml); what a kernel cannot take is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path

from onnx import ModelProto, NodeProto

from edgedetr.errors import ExportError, did_you_mean
from edgedetr.onnx_graph.hardware_limits import SMALLEST_INT8_PRODUCT
from edgedetr.onnx_graph.index import GraphIndex, int_attribute
from edgedetr.package_data import policies_directory
from edgedetr.storage.reading import read_toml, shown

_WEIGHTED = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Rule:
    """Nodes that stay float: every condition given must hold. See calib/policy/default.toml."""

    reason: str
    match: tuple[str, ...] = ("*",)
    unless: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def fits(self, node: NodeProto, graph: GraphIndex) -> bool:
        if self.ops and node.op_type not in self.ops:
            return False
        if self.reads:
            maker = graph.producers.get(node.input[0])
            if maker is None or maker.op_type not in self.reads:
                return False
        return _any(node.name, self.match) and not _any(node.name, self.unless)


@dataclass(frozen=True)
class Policy:
    """`quantize` lists the kinds of node that may become INT8; `rules` names those that stay float.

    float32   nodes that stay float32 where the rest of the graph is FP16
    """

    name: str
    quantize: tuple[str, ...] = _WEIGHTED
    residuals: bool = True
    rules: tuple[Rule, ...] = field(default=())
    float32: tuple[Rule, ...] = field(default=())


@dataclass(frozen=True)
class Layer:
    """A node to quantize: its data input, its weight and the weight's output-channel axis."""

    node: str
    op: str
    data: str
    weight: str
    axis: int


@dataclass(frozen=True)
class Residual:
    """An Add after a quantized Conv: the tensor of the branch that skips the block, and which input it is."""

    node: str
    index: int
    tensor: str


@dataclass(frozen=True)
class Plan:
    """What becomes INT8 in one graph, and the reason for every weighted node that does not."""

    layers: tuple[Layer, ...]
    residuals: tuple[Residual, ...]
    islands: dict[str, str]

    def tensors(self) -> list[str]:
        """Activations that are quantized in every dialect, in graph order, each once."""
        return list(dict.fromkeys([layer.data for layer in self.layers] + [item.tensor for item in self.residuals]))


def load(name_or_path: str | Path) -> Policy:
    """A shipped policy by name, or a TOML file; unknown keys are an error."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        folder = policies_directory()
        path = folder / f"{name_or_path}.toml"
        if not path.is_file():
            known = sorted(item.stem for item in folder.glob("*.toml"))
            raise ExportError(
                f"no policy named {str(name_or_path)!r}{did_you_mean(str(name_or_path), known)}; "
                f"expected one of {', '.join(known)}, or the path of a TOML file"
            )
    raw = read_toml(
        path, ExportError, fix="so it cannot be read as a policy; expected TOML like calib/policy/default.toml"
    )
    rules, float32 = (_rules(raw, key, path) for key in ("float", "float32"))
    return Policy(**_checked(raw, Policy, path, {"name": path.stem}), rules=rules, float32=float32)


def _rules(raw: dict[str, object], key: str, path: Path) -> tuple[Rule, ...]:
    """The [[key]] tables of a policy file, taken out of it."""
    tables = raw.pop(key, [])
    if not isinstance(tables, list):
        raise ExportError(f"{path}: `{key}` is no list; expected [[{key}]] tables")
    for table in tables:
        if not isinstance(table, dict):
            raise ExportError(f"{path}: an entry of `{key}` is {shown(table)}; expected [[{key}]] tables")
    return tuple(Rule(**_checked(table, Rule, path, {})) for table in tables)


def _checked(raw: dict[str, object], kind: type, path: Path, defaults: dict[str, object]) -> dict:  # type: ignore[type-arg]
    """Keys and types of one table of a policy file, lists as tuples."""
    known = {item.name: str(item.type) for item in fields(kind) if item.name not in ("rules", "float32")}
    values = {**defaults, **raw}
    for key, value in values.items():
        if key not in known:
            raise ExportError(
                f"{path}: unknown key {shown(key)}{did_you_mean(key[:100], known)}; expected one of {', '.join(known)}"
            )
        if known[key].startswith("tuple"):
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise ExportError(f"{path}: {key} is {shown(value)}; expected a list of strings")
            values[key] = tuple(value)
        elif type(value).__name__ != known[key]:
            raise ExportError(f"{path}: {key} is {shown(value)}; expected {known[key]}")
    if kind is Rule and not values.get("reason"):
        raise ExportError(f"{path}: a rule has no reason; expected one sentence for the reader")
    return values


def check_patterns(model: ModelProto, policy: Policy) -> None:
    """Errors: ExportError where a pattern fits no node of this graph, with the nearest part of a name.

    Patterns of the shipped default are passed over, since they are for all members, and every one fits some.
    """
    shipped = set(_patterns(load("default")))
    names = [node.name for node in model.graph.node]
    parts = {part for name in names for part in name.split("/") if part}
    for pattern in _patterns(policy):
        if pattern not in shipped and not any(fnmatchcase(name, pattern) for name in names):
            strange = [part for part in pattern.split("/") if part.strip("*") and part not in parts]
            near = did_you_mean(strange[0].strip("*"), parts) if strange else ""
            some = next((name for name in names if name), "(none has a name)")
            raise ExportError(
                f"policy {policy.name!r}: no node of this graph fits {pattern!r}{near}; expected "
                f"patterns of names like {some}"
            )


def _patterns(policy: Policy) -> list[str]:
    return [pattern for rule in (*policy.rules, *policy.float32) for pattern in (*rule.match, *rule.unless)]


def plan(model: ModelProto, policy: Policy) -> Plan:
    """Apply a policy to a float graph."""
    graph = GraphIndex(model)
    layers: list[Layer] = []
    islands: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        reason = _refusal(node, graph, policy)
        if reason:
            islands[node.name] = reason
        else:
            layers.append(Layer(node.name, node.op_type, node.input[0], node.input[1], _axis(node)))
    if not layers:
        raise ExportError(
            f"policy {policy.name!r} leaves nothing to quantize in this graph; expected at least one of "
            f"{', '.join(policy.quantize)}"
        )
    return Plan(tuple(layers), tuple(_residuals(graph, layers) if policy.residuals else ()), islands)


def _refusal(node: NodeProto, graph: GraphIndex, policy: Policy) -> str:
    """Why a weighted node stays float; empty when it is quantized."""
    if node.op_type not in policy.quantize:
        return f"{node.op_type} is not quantized by policy {policy.name!r}"
    if node.input[1] not in graph.initializers:
        return "product of two activations: softmax and its neighbors keep float range"
    shape = list(graph.initializers[node.input[1]].dims)
    for rule in policy.rules:
        if rule.fits(node, graph):
            return rule.reason
    if node.input[0] in graph.initializers:
        return "its data input is a constant"
    if node.op_type == "Conv" and int_attribute(node, "group", 1) != 1:
        return "grouped convolution: no fast INT8 kernel"
    added = len(node.input) > 2 and node.input[2] and node.input[2] not in graph.initializers
    if node.op_type == "Gemm" and (int_attribute(node, "transA", 0) or added):
        return "Gemm with a transposed or added activation"
    if node.op_type != "Conv" and (len(shape) != 2 or min(shape) < SMALLEST_INT8_PRODUCT):
        return f"fewer than {SMALLEST_INT8_PRODUCT} inputs or outputs: an integer product would be slower"
    return ""


def _axis(node: NodeProto) -> int:
    """Axis of the output channels in the weight: Conv [O, I, h, w], MatMul [I, O], Gemm [O, I] when transB."""
    if node.op_type == "MatMul":
        return 1
    return 0 if node.op_type == "Conv" or int_attribute(node, "transB", 0) else 1


def _residuals(graph: GraphIndex, layers: list[Layer]) -> list[Residual]:
    """Adds of a quantized Conv's output and another activation, whose sum is quantized: the other one is quantized too.

    The Conv's own output is not: TensorRT adds it in the convolution's accumulator. Where both branches end in a
    quantized Conv, the first input keeps its accumulator.
    """
    convs = {layer.node for layer in layers if layer.op == "Conv"}
    read = {layer.data for layer in layers}
    found = []
    for node in graph.model.graph.node:
        if node.op_type != "Add" or graph.after_relu(node.output[0]) not in read:
            continue
        if any(name in graph.initializers for name in node.input):
            continue
        makers = [graph.producers.get(name) for name in node.input]
        fused = [
            maker is not None and maker.name in convs and graph.only_consumer(name) is node
            for maker, name in zip(makers, node.input)
        ]
        if any(fused):
            index = 1 - fused.index(True)
            found.append(Residual(node.name, index, node.input[index]))
    return found


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
