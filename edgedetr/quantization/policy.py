"""The policy: which nodes of a float graph become INT8, and why the others do not.

The rules are data (calib/policy/*.toml): they name layers by role, operator or node name. What no integer kernel
supports is decided here. `make_plan` is the entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto

from edgedetr.errors import ExportError, did_you_mean
from edgedetr.onnx_graph.hardware_limits import SMALLEST_INT8_CHANNELS, SMALLEST_INT8_PRODUCT, is_narrow
from edgedetr.onnx_graph.index import GraphIndex, int_attribute
from edgedetr.package_data import patterns_file, policies_directory
from edgedetr.printable import shown
from edgedetr.storage.reading import read_toml

log = logging.getLogger(__name__)

_WEIGHTED = ("Conv", "MatMul", "Gemm")


# ------------------------------------------------------------------------------------------------------ roles of nodes
# What a node's layer is for in the detector: "decoder", "query_selection", "memory_projection", ... `edgedetr export`
# writes the role that the member declares (Role in edgedetr/models/roles.py) into the node's metadata in model.onnx,
# `edgedetr import` the role that it infers from the graph. Policies decide by roles, so they hold for every member,
# whatever its modules are called.

ROLE_KEY = "edgedetr.role"  # in NodeProto.metadata_props

# Versions 0.1 and 0.2 wrote no roles; their policy matched node names, which are module paths. The first pattern that
# fits decides. The table is for their files, and never grows: a new layer gets its role from the member's declaration.
ROLE_BY_NAME = {
    "*/cross_attention/value/*": "memory_projection",
    "*/cross_attention/k/*": "memory_projection",
    "*/cross_attention/v/*": "memory_projection",
    "*/interaction/weights/*": "dynamic_head",
    "*/interaction/out/*": "dynamic_head",
    "*/decoder/*": "decoder",
    "*/selector/project/*": "memory_projection",
    "*/selector/*": "query_selection",
    "*/encoder/*/offset*": "sampling_offsets",
    "*/encoder/*/activation/*": "dynamic_relu",
    "*/attention/offsets/*": "sampling_offsets",
    "*/attention/weights/*": "attention_weights",
}


def set_role(node: NodeProto, role: str) -> None:
    """Write a role into a node's metadata, in place of the one it may have; "" removes it."""
    kept = [item for item in node.metadata_props if item.key != ROLE_KEY]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)
    if role:
        node.metadata_props.add(key=ROLE_KEY, value=role)


def get_role(node: NodeProto) -> str:
    """The role in a node's metadata; "" where it has none."""
    return next((item.value for item in node.metadata_props if item.key == ROLE_KEY), "")


def role_from_name(name: str) -> str:
    """The role that follows from a node's name, as in files of versions 0.1 and 0.2; "" for a name without one."""
    return next((role for pattern, role in ROLE_BY_NAME.items() if fnmatchcase(name, pattern)), "")


def node_roles(model: ModelProto) -> dict[str, str]:
    """{node name: role} of the nodes that have a role.

    Read from the metadata; in a graph without any role, which 0.1 or 0.2 wrote, derived from the names.
    """
    roles = {node.name: role for node in model.graph.node if (role := get_role(node))}
    if not roles:
        roles = {node.name: role for node in model.graph.node if (role := role_from_name(node.name))}
    return roles


# ---------------------------------------------------------------------------------------------------------- the policy


# {digest of a version's default policy: of the one, by node names, that kept the same layers float}. A device that has
# a bundle but no calibration images would otherwise write its graphs again without bias correction.
_BY_NAMES = "62eb5149a85aecf325711ae1902ce48a4d0197de1e1a95836c7a3aff4b1bd8dd"
_SAME_LAYERS = {
    "ddb86e2f82520cb8a90be82afaf4949cedcaf2b6dc8f12bbff1b6d5891c2f3ce": _BY_NAMES,  # this version
    "bbb463e77815b46ab9b5bffd03ae49113759553a6d7f70bd02fc5791af1b6930": _BY_NAMES,  # one reason in other words
}


@dataclass(frozen=True)
class PolicyRule:
    """Nodes that stay float: every condition given must hold. See calib/policy/default.toml.

    reason   one sentence for the reader
    roles    roles of the node's layer
    match    patterns of node names
    unless   exceptions to `match`, patterns of node names
    ops      operators
    reads    operators of which one produces the node's data input
    """

    reason: str
    match: tuple[str, ...] = ("*",)
    unless: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def fits(self, node: NodeProto, graph: GraphIndex, roles: Mapping[str, str]) -> bool:
        """Whether the rule names this node. roles: {node name: role} of the graph."""
        if self.roles and roles.get(node.name) not in self.roles:
            return False
        if self.ops and node.op_type not in self.ops:
            return False
        if self.reads:
            producer = graph.producers.get(node.input[0]) if node.input else None
            if producer is None or producer.op_type not in self.reads:
                return False
        return _any(node.name, self.match) and not _any(node.name, self.unless)


@dataclass(frozen=True)
class Policy:
    """quantize       operators that may become INT8
    residuals      whether the skipping branch of a residual sum is quantized
    float_rules    nodes that do not become INT8 ([[float]] in the file)
    float32_rules  nodes that stay float32 where the rest of the graph is FP16 ([[float32]] in the file)
    """

    name: str
    quantize: tuple[str, ...] = _WEIGHTED
    residuals: bool = True
    float_rules: tuple[PolicyRule, ...] = field(default=())
    float32_rules: tuple[PolicyRule, ...] = field(default=())

    def all_rules(self) -> tuple[PolicyRule, ...]:
        return (*self.float_rules, *self.float32_rules)

    def sha256(self) -> str:
        """Digest of the policy: graphs that were made with the same one are fresh.

        Computed from the names and values that 0.1 wrote, so that a graph made with a user's policy stays fresh.
        """
        values = asdict(self)
        values["quantise"] = values.pop("quantize")
        values["rules"], values["float32"] = (
            [{key: value for key, value in rule.items() if key != "roles" or value} for rule in values.pop(name)]
            for name in ("float_rules", "float32_rules")
        )
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return _SAME_LAYERS.get(digest, digest)

    def float32_nodes(self, model: ModelProto) -> dict[str, str]:
        """{name of a node that must stay float32 in an FP16 graph: reason}."""
        if not self.float32_rules:
            return {}
        graph, roles = GraphIndex(model), node_roles(model)
        reasons = {node.name: _reason(self.float32_rules, node, graph, roles) for node in graph.nodes}
        return {name: reason for name, reason in reasons.items() if reason}


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
    """An Add after a quantized Conv: the tensor of the branch that skips the block, and its input index."""

    node: str
    index: int
    tensor: str


@dataclass(frozen=True)
class Product:
    """A MatMul of two activations whose inputs are both quantized: of attention, or with weights that are predicted."""

    node: str
    inputs: tuple[str, str]


@dataclass(frozen=True)
class QuantizationPlan:
    """What becomes INT8 in one graph, and the reason for every node with weights that does not.

    float_layers   {node name: reason}
    products       only with a placement: a policy keeps products of two activations float
    """

    layers: tuple[Layer, ...]
    residuals: tuple[Residual, ...]
    float_layers: dict[str, str]
    products: tuple[Product, ...] = ()


CURE = "+"  # between a policy and the cures of known patterns that are added to it: "default+openvino-concat"


def load_policy(name_or_path: str | Path) -> Policy:
    """A shipped policy by name, or a TOML file; with "+NAME" the cure of a known pattern is added to its rules.

    Errors: ExportError, also for unknown keys, and for a pattern without a cure that export can apply.
    """
    base = without_cures(name_or_path)
    policy = _load_policy(base)
    for cure in filter(None, str(name_or_path)[len(base) :].split(CURE)):
        name, rules = f"{policy.name}{CURE}{cure}", (*policy.float_rules, *_cure(cure))
        policy = replace(policy, name=name, float_rules=rules)
    return policy


def without_cures(name_or_path: str | Path) -> str:
    """The policy to which cures are added: "default" of "default+openvino-concat"."""
    text = str(name_or_path)
    return text if Path(text).is_file() else text.partition(CURE)[0]


def _cure(name: str) -> tuple[PolicyRule, ...]:
    """The [[pattern.float]] rules of one entry of calib/patterns/known.toml."""
    path = patterns_file()
    entries = read_toml(path, ExportError)["pattern"]
    cures = {entry["name"]: entry for entry in entries if "float" in entry}
    if name not in cures:
        raise ExportError(f"no cure named {name!r}{did_you_mean(name, cures)}; expected one of {', '.join(cures)}")
    return rules_of(cures[name], "float", path)


def _load_policy(name_or_path: str) -> Policy:
    """A shipped policy by name, or a TOML file."""
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
    if "quantise" in raw:
        log.warning("%s: `quantise` is `quantize` now; it is still read", path)
        raw["quantize"] = raw.pop("quantise")
    float_rules, float32_rules = (rules_of(raw, key, path) for key in ("float", "float32"))
    values = _checked(raw, Policy, path, {"name": path.stem})
    return Policy(**values, float_rules=float_rules, float32_rules=float32_rules)


def rules_of(raw: dict[str, object], key: str, path: str | Path) -> tuple[PolicyRule, ...]:
    """The [[key]] tables of a policy file; the key is removed from `raw`."""
    tables = raw.pop(key, [])
    if not isinstance(tables, list):
        raise ExportError(f"{path}: `{key}` is no list; expected [[{key}]] tables")
    for table in tables:
        if not isinstance(table, dict):
            raise ExportError(f"{path}: an entry of `{key}` is {shown(table)}; expected [[{key}]] tables")
    return tuple(PolicyRule(**_checked(table, PolicyRule, path, {})) for table in tables)


def _checked(raw: dict[str, object], kind: type[Any], path: str | Path, defaults: dict[str, object]) -> dict[str, Any]:
    """Keys and types of one table of a policy file, lists as tuples."""
    known = {item.name: str(item.type) for item in fields(kind) if not item.name.endswith("_rules")}
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
    if kind is PolicyRule and not values.get("reason"):
        raise ExportError(f"{path}: a rule has no reason; expected one sentence for the reader")
    return values


def check_policy(model: ModelProto, policy: Policy) -> None:
    """Errors: ExportError where a pattern or a role of the policy fits no node of this graph, with the nearest word.

    Patterns and roles of the shipped defaults, of this version and of 0.2, are accepted, since they are for all members
    and a policy may be a copy; a test checks that every rule of the shipped default fits some member.
    """
    shipped = load_policy("default").all_rules()
    names = [node.name for node in model.graph.node]
    parts = {part for name in names for part in name.split("/") if part}
    known_patterns = {pattern for rule in shipped for pattern in (*rule.match, *rule.unless)} | ROLE_BY_NAME.keys()
    for pattern in (pattern for rule in policy.all_rules() for pattern in (*rule.match, *rule.unless)):
        if pattern not in known_patterns and not any(fnmatchcase(name, pattern) for name in names):
            strange = [part for part in pattern.split("/") if part.strip("*") and part not in parts]
            near = did_you_mean(strange[0].strip("*"), parts) if strange else ""
            some = next((name for name in names if name), "(none has a name)")
            raise ExportError(
                f"policy {policy.name!r}: no node of this graph fits {pattern!r}{near}; expected "
                f"patterns of names like {some}"
            )
    known_roles = {role for rule in shipped for role in rule.roles} | set(node_roles(model).values())
    for role in (role for rule in policy.all_rules() for role in rule.roles):
        if role not in known_roles:
            raise ExportError(
                f"policy {policy.name!r}: no node of this graph has the role {role!r}"
                f"{did_you_mean(role, known_roles)}; expected one of {', '.join(sorted(known_roles))}"
            )


def make_plan(graph: GraphIndex, policy: Policy) -> QuantizationPlan:
    """Apply a policy to a float graph."""
    roles = node_roles(graph.model)
    layers: list[Layer] = []
    float_layers: dict[str, str] = {}
    for node in weighted_nodes(graph):
        reason = why_float(node, graph, policy, roles)
        if reason:
            float_layers[node.name] = reason
        else:
            layers.append(layer_of(node))
    if not layers:
        raise ExportError(
            f"policy {policy.name!r} leaves nothing to quantize in this graph; expected at least one of "
            f"{', '.join(policy.quantize)}"
        )
    return QuantizationPlan(tuple(layers), residual_sums(graph, layers) if policy.residuals else (), float_layers)


def weighted_nodes(graph: GraphIndex) -> list[NodeProto]:
    """The nodes that a policy decides on: convolutions and products, in the order of the graph."""
    return [node for node in graph.nodes if node.op_type in _WEIGHTED]


def layer_of(node: NodeProto) -> Layer:
    """The record of a node with a constant weight."""
    return Layer(node.name, node.op_type, node.input[0], node.input[1], _channel_axis(node))


def why_float(node: NodeProto, graph: GraphIndex, policy: Policy, roles: Mapping[str, str]) -> str:
    """Why a policy leaves a convolution or product float; empty when it is quantized."""
    if node.op_type not in policy.quantize:
        return f"{node.op_type} is not quantized by policy {policy.name!r}"
    if node.input[1] not in graph.initializers:
        return "product of two activations: softmax and its neighbors keep float range"
    return _reason(policy.float_rules, node, graph, roles) or why_no_kernel(node, graph)


def why_no_kernel(node: NodeProto, graph: GraphIndex) -> str:
    """Why no integer kernel is fast for a node with a constant weight; empty where one is."""
    shape = list(graph.initializers[node.input[1]].dims)
    if node.input[0] in graph.initializers:
        return "its data input is a constant"
    if node.op_type == "Conv" and int_attribute(node, "group", 1) != 1:
        return "grouped convolution: no fast INT8 kernel"
    if node.op_type == "Conv" and is_narrow(shape[1], shape[0]):
        return f"fewer than {SMALLEST_INT8_CHANNELS} channels on one side: an INT8 kernel fills them up to 32"
    added = len(node.input) > 2 and node.input[2] and node.input[2] not in graph.initializers
    if node.op_type == "Gemm" and (int_attribute(node, "transA", 0) or added):
        return "Gemm with a transposed or added activation"
    if node.op_type != "Conv" and (len(shape) != 2 or min(shape) < SMALLEST_INT8_PRODUCT):
        return f"fewer than {SMALLEST_INT8_PRODUCT} inputs or outputs: an integer product would be slower"
    return ""


def _reason(rules: tuple[PolicyRule, ...], node: NodeProto, graph: GraphIndex, roles: Mapping[str, str]) -> str:
    """The reason of the first rule that fits a node; "" where none does."""
    return next((rule.reason for rule in rules if rule.fits(node, graph, roles)), "")


def _channel_axis(node: NodeProto) -> int:
    """Axis of the output channels in the weight: Conv [O, I, h, w], MatMul [I, O], Gemm [O, I] when transB."""
    if node.op_type == "MatMul":
        return 1
    return 0 if node.op_type == "Conv" or int_attribute(node, "transB", 0) else 1


def residual_sums(graph: GraphIndex, layers: Sequence[Layer]) -> tuple[Residual, ...]:
    """Adds of a quantized Conv's output and another activation, where the sum is quantized: the other one is, too.

    The Conv's output is not: TensorRT adds it in the convolution's accumulator. Where both branches end in a quantized
    Conv, the first input stays in its accumulator.
    """
    convs = {layer.node for layer in layers if layer.op == "Conv"}
    quantized = {layer.data for layer in layers}
    found = []
    for node in graph.nodes:
        if node.op_type != "Add" or graph.after_relu(node.output[0]) not in quantized:
            continue
        if any(name in graph.initializers for name in node.input):
            continue
        producers = [graph.producers.get(name) for name in node.input]
        fused = [
            producer is not None and producer.name in convs and graph.only_consumer(name) is node
            for producer, name in zip(producers, node.input)
        ]
        if any(fused):
            index = 1 - fused.index(True)
            found.append(Residual(node.name, index, node.input[index]))
    return tuple(found)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
