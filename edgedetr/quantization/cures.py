"""Cure an INT8 graph of the known patterns at which its target goes wrong (calib/patterns/known.toml).

A pattern names edits of the quantized graph: another order of Q and DQ, or one scale for the inputs of a Concat. Where
it names none, or they are not possible, the layer becomes a float fallback: it leaves the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.patterns import Measured, Pattern, matching, patterns, place
from edgedetr.quantization.policy import QuantizationPlan, residual_sums
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.qdq_moves import moved_before, moved_behind, quantized_padding, shared_scale
from edgedetr.quantization.target import Target
from edgedetr.runtime.cure_record import Cure

EDITS: Mapping[str, Callable[[ModelProto, str], ModelProto]] = {
    "shared-scale": shared_scale,
    "move-before": moved_before,
    "move-behind": moved_behind,
    "quantize-padding": quantized_padding,
}
WORDS = {
    "shared-scale": "one scale for the inputs",
    "move-before": "another order",
    "move-behind": "another order",
    "quantize-padding": "a quantized padding",
}
FALLBACK = "a float fallback"


@dataclass(frozen=True)
class Cured:
    """A graph, and what was found in it; float fallbacks are named, and not yet made."""

    model: ModelProto
    cures: tuple[Cure, ...] = ()


def cured(model: ModelProto, backends: Sequence[str]) -> Cured:
    """A quantized graph without the known patterns at which backends depart from it, as far as edits can cure them.

    Another order and a quantized padding change no bit of the reference run; one scale rounds the values of the smaller
    scales anew.
    """
    cures: list[Cure] = []
    for backend in backends:
        for layer, pattern in faults(model, backend):
            edited, reason = model, f"{pattern.name}: its known cure is to stay float"
            try:
                if pattern.steps:
                    edited, reason = _edited(model, layer, pattern), ""
            except ExportError as error:
                reason = f"{pattern.name}: no other cure is possible here ({error})"
            words = dict.fromkeys(WORDS[step.edit] for step in pattern.steps)
            how = FALLBACK if reason else ", ".join(words)
            cures.append(Cure(backend, pattern.name, how, layer, reason))
            model = edited
    return Cured(model, tuple(cures))


def faults(model: ModelProto, backend: str) -> list[tuple[str, Pattern]]:
    """(layer, the first pattern there at which a backend departs from the graph, and which export can cure)."""
    graph = GraphIndex(model)
    found = []
    for node in graph.nodes:
        known = [pattern for pattern in matching(graph, node, Measured(backend)) if pattern.curable]
        if known and node.name:
            found.append((node.name, known[0]))
    return found


def _edited(model: ModelProto, layer: str, pattern: Pattern) -> ModelProto:
    """The graph with a pattern's steps done; as it is where the cure of another layer was one for this too."""
    graph = GraphIndex(model)
    nodes = place(graph, graph.node_by_name[layer], pattern)
    for step in pattern.steps if nodes else ():
        assert nodes is not None
        model = EDITS[step.edit](model, nodes[step.node].output[0])
    return model


# --------------------------------------------------------------------------------------------------------------- a plan


@dataclass(frozen=True)
class CuredPlan:
    """plan    without the layers that are float fallbacks
    cures   what `cured` will do to its graph, and the fallbacks
    """

    plan: QuantizationPlan
    cures: tuple[Cure, ...] = ()


def cured_plan(
    graph: GraphIndex, plan: QuantizationPlan, amax: Mapping[str, float], target: Target, backends: Sequence[str]
) -> CuredPlan:
    """What the known patterns of backends change in the graph of a plan.

    graph, plan, amax, target   as `qdq.insert_qdq` takes them
    """
    concerned = [backend for backend in backends if concerns(target, backend)]
    if not concerned:
        return CuredPlan(plan)
    found = cured(insert_qdq(graph, plan, amax, target), concerned).cures
    layers = {layer.node for layer in plan.layers}
    kept = tuple(cure for cure in found if not cure.reason or cure.layer in layers)
    return CuredPlan(_without(graph, plan, [cure for cure in kept if cure.reason]), kept)


def concerns(target: Target, backend: str) -> bool:
    """Whether a graph in the form of a target can have a known pattern of a backend that export cures."""
    known = [pattern for pattern in patterns() if pattern.curable and backend in pattern.backends]
    return any(not (pattern.signed if target.uint8 else pattern.asymmetric) for pattern in known)


def _without(graph: GraphIndex, plan: QuantizationPlan, fallbacks: Sequence[Cure]) -> QuantizationPlan:
    if not fallbacks:
        return plan
    reasons = {cure.layer: cure.reason for cure in fallbacks}
    layers = tuple(layer for layer in plan.layers if layer.node not in reasons)
    if not (layers or plan.products):
        raise ExportError(
            "the cures of known patterns leave nothing to quantize; use FP16: edgedetr export BUNDLE --fp16, or leave "
            "them out: --no-cure"
        )
    return replace(
        plan,
        layers=layers,
        residuals=residual_sums(graph, layers) if plan.residuals else (),
        float_layers={**plan.float_layers, **reasons},
    )
