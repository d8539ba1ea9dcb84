"""Decide what the graph leaves open about its outputs: by options, by config.json, by labeled images, by the values.

Without evidence nothing is decided: the error names the option that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from edgedetr.bundle import InputContract, OutputContract
from edgedetr.data.detection_set import DetectionSet
from edgedetr.data.images import decode as decode_image
from edgedetr.errors import MissingDependency, UsageError
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.importing import output_formats
from edgedetr.importing.class_names import ClassColumns
from edgedetr.importing.io_contract import SelectedOutputs
from edgedetr.importing.output_formats import (
    ACTIVATIONS,
    Activation,
    Evidence,
    Layout,
    activation_from_logits,
    activation_from_model_type,
)
from edgedetr.importing.output_meaning import OutputMeaning
from edgedetr.importing.source_model import SourceModel, raw_outputs
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.preprocess import prepare

LABELED_IMAGES = 16  # of the verify split, to score readings on
DECISIVE_AP = 1.0  # points; from here on labels decide, if the second reading has at most half of the AP


@dataclass(frozen=True)
class Clues:
    """What is known besides the graph's outputs.

    graph        index of the graph
    model_type   in config.json; None without
    noise        class logits [N, width] on images of noise
    labeled      labeled images; None without
    has_class_count   whether anything says how many classes there are
    """

    graph: GraphIndex
    model_type: str | None
    noise: Sequence[np.ndarray]
    labeled: LabeledImages | None
    has_class_count: bool


@dataclass(frozen=True)
class Resolution:
    """The meaning with nothing left open, its classes, and its AP in points on labeled images, or None."""

    meaning: OutputMeaning
    columns: ClassColumns
    ap: float | None


@dataclass(frozen=True)
class _ScoredReading:
    activation: Activation
    layout: Layout
    ap: float


def resolve_ambiguity(
    meaning: OutputMeaning, columns_for: Callable[[Activation], ClassColumns], clues: Clues
) -> Resolution:
    """Choose one activation and one layout of boxes among those that fit.

    columns_for   the classes of the logits under an activation; raises UsageError where they do not fit
    Errors: UsageError, ExportError that name the option which decides.
    """
    possible, errors = _possible_activations(meaning, columns_for)
    evidence = None
    if meaning.activation is None:
        evidence = _stated_activation(meaning, possible, errors, clues)
    elif not possible:
        raise errors[meaning.activation]
    tried = [evidence.activation] if evidence else list(possible)
    readings = clues.labeled.score(meaning, {name: possible[name] for name in tried}) if clues.labeled else []
    reasons = []
    decisive = bool(readings) and readings[0].ap >= DECISIVE_AP
    decisive = decisive and (len(readings) < 2 or readings[1].ap <= readings[0].ap / 2)
    layouts, decided = meaning.layouts, meaning.decided
    if decisive and len(readings) > 1:
        best, second = readings[:2]
        reasons.append(
            f"{best.activation} and {best.layout} have AP {best.ap:.1f} on "
            f"{len(clues.labeled.dataset) if clues.labeled else 0} "
            f"labeled images, {second.activation} and {second.layout} {second.ap:.1f}"
        )
        evidence = evidence or Evidence(best.activation, "the labels decide")
        layouts, decided = (best.layout,), True
    if meaning.activation is None and evidence is None:
        evidence = _selects_by_all_scores(clues.graph, meaning) or activation_from_logits(np.concatenate(clues.noise))
        if evidence is None or evidence.activation not in possible:
            raise _open_activation(meaning, possible)
    activation = meaning.activation or (evidence.activation if evidence else ACTIVATIONS[0])
    if not decided:
        raise output_formats.ambiguous_layouts(meaning.layouts)
    ap = next((one.ap for one in readings if (one.activation, one.layout) == (activation, layouts[0])), None)
    if evidence is not None:
        reasons.insert(0, f"{evidence.activation}: {evidence.reason}")
    chosen = meaning.with_layout(layouts[0])
    return Resolution(
        replace(chosen, activation=activation, reasons=(*meaning.reasons, *reasons)), possible[activation], ap
    )


def _possible_activations(
    meaning: OutputMeaning, columns_for: Callable[[Activation], ClassColumns]
) -> tuple[dict[Activation, ClassColumns], dict[Activation, UsageError]]:
    """Classes by activation, and the errors of those that do not fit."""
    possible: dict[Activation, ClassColumns] = {}
    errors: dict[Activation, UsageError] = {}
    for activation in ACTIVATIONS if meaning.activation is None else (meaning.activation,):
        try:
            possible[activation] = columns_for(activation)
        except UsageError as error:
            errors[activation] = error
    return possible, errors


def _stated_activation(
    meaning: OutputMeaning, possible: dict[Activation, ClassColumns], errors: dict[Activation, UsageError], clues: Clues
) -> Evidence | None:
    """The activation that config.json or the number of classes implies; None if neither does."""
    evidence = activation_from_model_type(clues.model_type)
    if evidence is not None and evidence.activation not in possible:
        raise errors[evidence.activation]
    if not possible:
        raise errors["sigmoid"]
    if evidence is None and len(possible) == 1 and clues.has_class_count:
        only = next(iter(possible))
        return Evidence(
            only,
            f"{meaning.width} class logits for {len(possible[only].classes)} classes: "
            + ("sigmoid, no 'no object'" if only == "sigmoid" else "softmax"),
        )
    return evidence


def _open_activation(meaning: OutputMeaning, possible: dict[Activation, ClassColumns]) -> UsageError:
    """The error if both activations fit."""
    classes = len(next(iter(possible.values())).classes)
    counts = {len(one.classes) for one in possible.values()}
    what = f" for {classes} classes" if len(possible) > 1 and len(counts) == 1 else ""
    return UsageError(
        f"the file has {meaning.width} class logits{what}; say what they are: --activation softmax (DETR: "
        "the last one is 'no object') or --activation sigmoid (RT-DETR, RF-DETR: each stands for itself, "
        "or the last one is not used); labeled images may decide: --data DIR"
    )


def _selects_by_all_scores(graph: GraphIndex, meaning: OutputMeaning) -> Evidence | None:
    """Sigmoid, if the graph selects queries by the maximum of all class scores: "no object" would always win there."""
    for node in graph.nodes:
        if node.op_type != "TopK":
            continue
        producer = graph.producers.get(node.input[0])
        while producer is not None and producer.op_type in ("Squeeze", "Reshape", "Cast", "Identity", "Sigmoid"):
            producer = graph.producers.get(producer.input[0])
        is_maximum = producer is not None and producer.op_type == "ReduceMax"
        shape = graph.shape(producer.input[0]) if producer is not None and is_maximum else None
        if shape and shape[-1] == meaning.width and len(shape) == 3:
            return Evidence(
                "sigmoid",
                f"the graph chooses its queries by the best of all {meaning.width} class scores, "
                "which 'no object' would win",
            )
    return None


class LabeledImages:
    """Labeled images, and the source model's outputs for them."""

    def __init__(self, dataset: DetectionSet, source: SourceModel, contract: InputContract) -> None:
        self.dataset = replace(dataset, samples=dataset.evenly_spaced(LABELED_IMAGES))
        self.source, self.contract = source, contract

    def score(self, meaning: OutputMeaning, columns: dict[Activation, ClassColumns]) -> list[_ScoredReading]:
        """AP of each activation and layout, the best first.

        Empty if the file itself selects objects, and if pycocotools is missing where there is nothing to decide.
        """
        outputs = meaning.outputs
        if isinstance(outputs, SelectedOutputs):
            return []
        readings = list(product(columns, meaning.layouts))
        detections: dict[tuple[Activation, Layout], dict[int, Detections]] = {reading: {} for reading in readings}
        for sample in self.dataset.samples:
            images, geometries = prepare([decode_image(sample.path)], self.contract)
            values = self.source.outputs(images)
            for activation, layout in readings:
                read = replace(meaning.with_layout(layout), activation=activation)
                raw = raw_outputs(outputs, read, values)
                logits = raw.logits[..., list(columns[activation].columns)]
                detections[activation, layout][sample.image_id] = decode(
                    RawOutputs(logits, raw.boxes), geometries, columns[activation].classes, OutputContract(activation)
                )[0]
        try:
            scored = [
                _ScoredReading(*reading, evaluate(self.dataset, found, by_size=False).ap or 0.0)
                for reading, found in detections.items()
            ]
        except MissingDependency:
            if len(readings) > 1:
                raise
            return []
        return sorted(scored, key=lambda one: -one.ap)
