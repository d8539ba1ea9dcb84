"""Placement: which groups of a graph are INT8, each with its observer, where that is not left to the policy.

A search writes it into the bundle as placement.json, and `edgedetr export --int8` follows it. `plan_for` and
`quantized_model` are what export, sensitivity analysis and search share: one path from a placement to a graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from edgedetr.artifacts import ONNX, PLACEMENT
from edgedetr.bundle import Bundle
from edgedetr.errors import ExportError, did_you_mean
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.printable import shown
from edgedetr.quantization.groups import Group, floor_of, groups_of
from edgedetr.quantization.policy import (
    Policy,
    Product,
    QuantizationPlan,
    layer_of,
    make_plan,
    node_roles,
    residual_sums,
    why_float,
)
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.target import Target
from edgedetr.storage.reading import MEBIBYTE, read_json

SCHEMA = 1
LIMIT = 16 * MEBIBYTE  # bytes of placement.json; 1,000 groups take about 100 kB
FIX = "run: edgedetr export BUNDLE --int8, after you removed placement.json"


@dataclass(frozen=True)
class Placement:
    """Which groups are INT8. A group that is not named is float.

    int8        ids of groups
    observers   {group id: label of an observer ("mse", "percentile 99.9")} where it is not that of quant.observer; it
                decides the ranges of the tensors that the group reads. The first group that reads a tensor decides
    smooth      {group id: alpha} SmoothQuant where it is not quant.smooth; the first group that reads a tensor decides
    """

    int8: tuple[str, ...]
    observers: Mapping[str, str] = field(default_factory=dict)
    smooth: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_policy(cls, groups: Sequence[Group]) -> Placement:
        """What the policy chooses."""
        return cls(tuple(group.id for group in groups if group.default))

    def sha256(self) -> str:
        """Digest of the values: graphs that were made with the same one are fresh."""
        return hashlib.sha256(json.dumps(self._values(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"schema": SCHEMA, **self._values()}, indent=1) + "\n", encoding="utf-8")

    def _values(self) -> dict[str, object]:
        return {"int8": sorted(self.int8), "observers": dict(self.observers), "smooth": dict(self.smooth)}

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Errors: ExportError for a file that is damaged or of another kind."""
        raw = read_json(path, ExportError, limit=LIMIT, fix=FIX)
        try:
            _check_fields(raw)
        except ValueError as error:
            raise ExportError(f"{path}: damaged or of another kind ({error}); {FIX}") from error
        return cls(tuple(raw["int8"]), raw["observers"], {name: float(alpha) for name, alpha in raw["smooth"].items()})


def _check_fields(raw: Any) -> None:
    """Errors: ValueError where keys or types are not those of `Placement.save`."""
    keys = {"schema", "int8", "observers", "smooth"}
    if not isinstance(raw, dict) or set(raw) != keys:
        raise ValueError(f"expected the keys {', '.join(sorted(keys))}")
    if raw["schema"] != SCHEMA or isinstance(raw["schema"], bool):
        raise ValueError(f"schema is {shown(raw['schema'])}, this version reads {SCHEMA}")
    if not (isinstance(raw["int8"], list) and all(isinstance(name, str) for name in raw["int8"])):
        raise ValueError("int8 is no list of names")
    if not (isinstance(raw["observers"], dict) and all(isinstance(label, str) for label in raw["observers"].values())):
        raise ValueError("observers is no object of labels")
    if not isinstance(raw["smooth"], dict):
        raise ValueError("smooth is no object of numbers")
    for alpha in raw["smooth"].values():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"smooth holds {shown(alpha)}; expected numbers from 0 to 1")


def placement_of(bundle: Bundle, aside: str = "") -> tuple[Placement | None, str]:
    """The placement that an export of this bundle follows, and a sentence about it; (None, "") where there is none.

    aside   why the bundle's placement.json is not followed; "" = it is
    """
    if PLACEMENT.file not in bundle.manifest.files:
        return None, ""
    if aside:
        return None, f"{PLACEMENT.file} is left aside: {aside}"
    if not bundle.has(PLACEMENT.file):
        return None, (
            f"{PLACEMENT.file} is left aside, and the policy decides: it is damaged, or was made for another "
            f"{ONNX.file}; search again, or remove it"
        )
    found = Placement.load(bundle.require(PLACEMENT.file))
    return found, f"{PLACEMENT.file} decides which layers are INT8: {len(found.int8)} groups"


# ------------------------------------------------------------------------------------------------------------ the plan


def plan_for(graph: GraphIndex, policy: Policy, placement: Placement | None) -> QuantizationPlan:
    """What becomes INT8: the groups of the placement, or what the policy chooses where there is none.

    graph   of a float model whose convolutions behind a Concat are split (concat_split.py)

    Errors: ExportError for a group that the graph does not have.
    """
    if placement is None:
        return make_plan(graph, policy)
    groups = _named_groups(graph, policy, placement)
    chosen = {name for group in groups for name in group.nodes if group.id in set(placement.int8)}
    roles = node_roles(graph.model)
    reasons = floor_of(graph)
    for group in groups:
        if group.id not in placement.int8:
            for name in group.nodes:
                why = why_float(graph.node_by_name[name], graph, policy, roles)
                reasons[name] = why or "placement: the accuracy budget keeps it float, or INT8 is not faster here"
    order = [node for node in graph.nodes if node.name in chosen]
    layers = tuple(layer_of(node) for node in order if node.input[1] in graph.initializers)
    products = tuple(Product(node.name, (node.input[0], node.input[1])) for node in order)
    weighted = {layer.node for layer in layers}
    return QuantizationPlan(
        layers,
        residual_sums(graph, layers) if policy.residuals else (),
        {node.name: reasons[node.name] for node in graph.nodes if node.name in reasons},
        tuple(product for product in products if product.node not in weighted),
    )


def _named_groups(graph: GraphIndex, policy: Policy, placement: Placement) -> tuple[Group, ...]:
    groups = groups_of(graph, policy)
    known = {group.id for group in groups}
    for name in (*placement.int8, *placement.observers, *placement.smooth):
        if name not in known:
            floor = floor_of(graph).get(name)
            because = f"that node is never INT8: {floor}" if floor else "the graph has no such group"
            raise ExportError(
                f"placement: {shown(name)}: {because}{did_you_mean(name, known)}; expected names as "
                f"`edgedetr sensitivity BUNDLE` lists them; {FIX}"
            )
    return groups


def observers_of(
    graph: GraphIndex, policy: Policy, placement: Placement | None, plan: QuantizationPlan
) -> dict[str, str]:
    """{tensor: label of its observer} for the quantized tensors whose observer is not that of quant.observer."""
    if placement is None or not placement.observers:
        return {}
    group_of = {name: group.id for group in groups_of(graph, policy) for name in group.nodes}
    reading = {layer.node: (layer.data,) for layer in plan.layers} | {one.node: one.inputs for one in plan.products}
    found: dict[str, str] = {}
    for node in graph.nodes:
        label = placement.observers.get(group_of.get(node.name, ""))
        for tensor in reading.get(node.name, ()) if label else ():
            found.setdefault(tensor, str(label))
    return found


def alphas_of(graph: GraphIndex, policy: Policy, placement: Placement | None, default: float) -> dict[str, float]:
    """{node: alpha of SmoothQuant at its input}: its group's in the placement, otherwise `default` (quant.smooth)."""
    chosen = placement.smooth if placement else {}
    return {name: chosen.get(group.id, default) for group in groups_of(graph, policy) for name in group.nodes}


# ------------------------------------------------------------------------------------------------------- the INT8 model


@dataclass(frozen=True)
class RangesByObserver:
    """Ranges of the same tensors by several observers.

    default   label of the observer that decides where a placement names none (quant.observer)
    amax      {label: {tensor: largest magnitude that INT8 represents}}
    """

    default: str
    amax: Mapping[str, Mapping[str, float]]

    def resolved(self, observers: Mapping[str, str]) -> dict[str, float]:
        """{tensor: range}, each by the observer that is named for it."""
        for label in {self.default, *observers.values()}:
            if label not in self.amax:
                raise ExportError(
                    f"placement: no ranges of observer {shown(label)}; expected one of {', '.join(sorted(self.amax))}"
                )
        chosen = dict(self.amax[self.default])
        return chosen | {tensor: self.amax[label][tensor] for tensor, label in observers.items()}


def quantized_model(
    graph: GraphIndex,
    policy: Policy,
    placement: Placement | None,
    ranges: RangesByObserver,
    target: Target,
    shifts: Mapping[str, np.ndarray] | None = None,
) -> ModelProto:
    """The float model with a placement's groups in INT8, in float32 elsewhere: what a search evaluates.

    graph    of a float model whose convolutions behind a Concat are split (concat_split.py)
    shifts   {layer: [O] to add to its bias}; None = biases are not corrected

    Without a group it computes exactly what the float model does. Export's last steps, `qdq.runnable` and FP16, are
    left to the caller.
    """
    if placement is not None and placement.smooth:
        raise ExportError(f"placement: only an export smooths; expected no alphas in `smooth` here; {FIX}")
    plan = plan_for(graph, policy, placement)
    amax = ranges.resolved(observers_of(graph, policy, placement, plan))
    return insert_qdq(graph, plan, share_pool_ranges(graph.model, amax), target, shifts)
