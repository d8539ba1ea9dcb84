"""Where a file leaves its meaning open, the choice: by what is said, by the labels of a data set, by the numbers.

A reading that nothing speaks for is not taken: the error names the option that decides.
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
from edgedetr.importing import box_format
from edgedetr.importing.box_format import Layout
from edgedetr.importing.class_format import BOTH, Activation, Evidence, by_model_type, by_numbers
from edgedetr.importing.import_options import Kept
from edgedetr.importing.original_model import Original
from edgedetr.importing.output_meaning import Understood
from edgedetr.importing.output_roles import Chosen
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import prepare

JUDGED = 16  # images of the verify split that readings are compared on
SPEAKS = 1.0  # AP in points from which labels decide; the next reading must have at most half of it


@dataclass(frozen=True)
class Choice:
    """The reading that was taken, and the AP on some images of the data set, or None."""

    found: Understood
    kept: Kept
    ap: float | None


@dataclass(frozen=True)
class _Judged:
    activation: Activation
    layout: Layout
    ap: float


def choose(
    found: Understood,
    columns: Callable[[Activation], Kept],
    graph: GraphIndex,
    model_type: str | None,
    noise: Sequence[np.ndarray],
    judge: Judge | None,
    counted: bool,
) -> Choice:
    """One reading of those that fit.

    columns   what the class logits stand for under an activation; UsageError where they cannot
    noise     class logits [N, width] on images of noise
    judge     the labeled images, where there are any
    counted   whether anything says how many classes there are
    """
    possible, faults = _possible(found, columns)
    evidence = None
    if found.activation is None:
        evidence = by_model_type(model_type)
        if evidence is not None and evidence.activation not in possible:
            raise faults[evidence.activation]
        if not possible:
            raise faults["sigmoid"]
        if evidence is None and len(possible) == 1 and counted:
            only = next(iter(possible))
            evidence = Evidence(
                only,
                f"{found.width} class logits for {len(possible[only].classes)} classes: "
                + ("sigmoid, no 'no object'" if only == "sigmoid" else "softmax"),
            )
    elif not possible:
        raise faults[found.activation]
    tried = [evidence.activation] if evidence else list(possible)
    judged = judge.all(found, {name: possible[name] for name in tried}) if judge else []
    why = []
    decisive = bool(judged) and judged[0].ap >= SPEAKS and (len(judged) < 2 or judged[1].ap <= judged[0].ap / 2)
    layouts, decided = found.layouts, found.decided
    if judged and decisive and len(judged) > 1:
        best, second = judged[:2]
        why.append(
            f"{best.activation} and {best.layout} have AP {best.ap:.1f} on {judge.count if judge else 0} "
            f"labeled images, {second.activation} and {second.layout} {second.ap:.1f}"
        )
        evidence = evidence or Evidence(best.activation, "the labels decide")
        layouts, decided = (best.layout,), True
    if found.activation is None and evidence is None:
        evidence = _selects_by_all(graph, found) or by_numbers(np.concatenate(noise))
        if evidence is None or evidence.activation not in possible:
            raise _open(found, possible)
    activation = found.activation or (evidence.activation if evidence else BOTH[0])
    if not decided:
        raise box_format.refuse(found.layouts)
    ap = next((one.ap for one in judged if (one.activation, one.layout) == (activation, layouts[0])), None)
    if evidence is not None:
        why.insert(0, f"{evidence.activation}: {evidence.why}")
    chosen = found.read_as(layouts[0])
    return Choice(replace(chosen, activation=activation, why=(*found.why, *why)), possible[activation], ap)


def _possible(
    found: Understood, columns: Callable[[Activation], Kept]
) -> tuple[dict[Activation, Kept], dict[Activation, UsageError]]:
    possible: dict[Activation, Kept] = {}
    faults: dict[Activation, UsageError] = {}
    for activation in BOTH if found.activation is None else (found.activation,):
        try:
            possible[activation] = columns(activation)
        except UsageError as fault:
            faults[activation] = fault
    return possible, faults


def _open(found: Understood, possible: dict[Activation, Kept]) -> UsageError:
    """The error where either activation fits."""
    classes = len(next(iter(possible.values())).classes)
    counts = {len(one.classes) for one in possible.values()}
    what = f" for {classes} classes" if len(possible) > 1 and len(counts) == 1 else ""
    return UsageError(
        f"the file has {found.width} class logits{what}; say what they are: --activation softmax (DETR: "
        "the last one is 'no object') or --activation sigmoid (RT-DETR, RF-DETR: each stands for itself, "
        "or the last one is not used); labeled images may decide: --data DIR"
    )


def _selects_by_all(graph: GraphIndex, found: Understood) -> Evidence | None:
    """Whether the graph chooses its queries by the best of as many class scores: "no object" would win there."""
    for node in graph.nodes:
        if node.op_type != "TopK":
            continue
        maker = graph.producers.get(node.input[0])
        while maker is not None and maker.op_type in ("Squeeze", "Reshape", "Cast", "Identity", "Sigmoid"):
            maker = graph.producers.get(maker.input[0])
        shape = graph.shape(maker.input[0]) if maker is not None and maker.op_type == "ReduceMax" else None
        if shape and shape[-1] == found.width and len(shape) == 3:
            return Evidence(
                "sigmoid",
                f"the graph chooses its queries by the best of all {found.width} class scores, "
                "which 'no object' would win",
            )
    return None


class Judge:
    """Labeled images, and what the file gives for them."""

    def __init__(self, dataset: DetectionSet, oracle: Original, contract: InputContract) -> None:
        chosen = np.linspace(0, len(dataset) - 1, min(JUDGED, len(dataset))).astype(int)
        self.dataset = replace(dataset, samples=tuple(dataset.samples[number] for number in chosen))
        self.oracle, self.contract, self.count = oracle, contract, len(chosen)

    def all(self, found: Understood, kept: dict[Activation, Kept]) -> list[_Judged]:
        """AP of each reading that fits, the best first; none where the file chooses by itself and pycocotools lacks."""
        if isinstance(found.answer, Chosen):
            return []
        readings = list(product(kept, found.layouts))
        detections: dict[tuple[Activation, Layout], dict[int, object]] = {reading: {} for reading in readings}
        for sample in self.dataset.samples:
            images, geometries = prepare([decode_image(sample.path)], self.contract)
            values = self.oracle.outputs(images)
            for activation, layout in readings:
                read = replace(found.read_as(layout), activation=activation)
                raw = self.oracle.raw(read, values)
                logits = raw.logits[..., list(kept[activation].places)]
                output = OutputContract(activation)
                detections[activation, layout][sample.image_id] = decode(
                    RawOutputs(logits, raw.boxes), geometries, kept[activation].classes, output
                )[0]
        try:
            judged = [
                _Judged(*reading, evaluate(self.dataset, one, by_size=False).ap or 0.0)  # type: ignore[arg-type]
                for reading, one in detections.items()
            ]
        except MissingDependency:
            if len(readings) > 1:
                raise
            return []
        return sorted(judged, key=lambda one: -one.ap)
