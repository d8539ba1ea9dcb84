"""What a file's outputs mean: traced back through the graph, then read off the numbers; what stays open is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from edgedetr.errors import ExportError, UsageError
from edgedetr.importing import box_format
from edgedetr.importing.box_format import BoxForm, Fitting, Layout
from edgedetr.importing.class_format import Activation, are_probabilities
from edgedetr.importing.decoding import boxes_of, selections
from edgedetr.importing.output_roles import Chosen, Dense, Values, roles
from edgedetr.importing.trace_outputs import (
    Block,
    Conversion,
    bent_by,
    conversion_of,
    ends_in_sigmoid,
    logits_of,
    matrices,
    run,
)
from edgedetr.onnx_graph.index import GraphIndex

Feeds = Sequence[dict[str, np.ndarray]]
Pair = tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """What the caller says of the outputs; None and () leave it to the file."""

    activation: Activation | None = None
    boxes: str | None = None  # one of box_reading.OPTIONS
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Understood:
    """The detector's answer in the graph, and what of its meaning is known.

    answer       the file's own outputs, by role
    logits, boxes   of all `queries`, `width` logits each, in the graph
    activation   None where nothing in the graph says it
    form         of `boxes`
    layouts      those that fit, the form's first; decided: whether that one is clearly the best
    given        form of the boxes in the file's own output
    probabilities   whether its scores have been through the activation
    labels       where the file chooses: its label for each class
    rule         "all", or "query" where it keeps one class of each query
    top_k        how many objects it chooses; None where it gives all queries
    logarithms   whether its scores are the logarithms of probabilities
    why          a sentence for each thing that was found
    """

    answer: Dense | Chosen
    logits: Block
    boxes: Block
    queries: int
    width: int
    activation: Activation | None
    form: BoxForm
    layouts: tuple[Layout, ...]
    decided: bool
    given: BoxForm
    probabilities: bool
    why: tuple[str, ...]
    labels: dict[int, int] | None = None
    rule: str = "all"
    top_k: int | None = None
    logarithms: bool = False

    def read_as(self, layout: Layout) -> Understood:
        """With one of the layouts that fit."""
        kept = self.given.layout == self.form.layout  # the graph converts nothing
        return replace(
            self,
            form=replace(self.form, layout=layout),
            layouts=(layout,),
            decided=True,
            given=replace(self.given, layout=layout) if kept else self.given,
        )


def understand(model: ModelProto, graph: GraphIndex, feeds: Feeds, asked: Asked, side: int) -> Understood:
    """Of the graph at its fixed size.

    feeds   inputs of a few images
    side    the size that an input of the original image's size holds
    """
    names = [item.name for item in model.graph.output]
    values = run(model, names, feeds)
    faults = [name for name in names for value in values if not np.isfinite(value[name]).all()]
    if faults:
        raise ExportError(
            f"output {faults[0]} has NaN or infinity on an image; expected finite numbers: check "
            "--scale, --mean and --std, and the file itself"
        )
    found = roles(graph, names, values, asked.outputs)
    image = next(value for value in feeds[0].values() if value.ndim == 4)
    sides = float(image.shape[3]), float(image.shape[2])
    factors = [(1.0, 1.0), sides, (float(side), float(side))]
    if isinstance(found, Chosen):
        return _chosen(model, graph, feeds, found, factors, asked)
    return _dense(model, graph, feeds, found, factors, asked)


def _dense(
    model: ModelProto, graph: GraphIndex, feeds: Feeds, found: Dense, factors: list[Pair], asked: Asked
) -> Understood:
    inner = [matrices(graph, block.tensor) for block in (found.scores, found.boxes)]
    values = run(model, list(dict.fromkeys([*inner[0], *inner[1], found.scores.tensor, found.boxes.tensor])), feeds)
    scores, boxes = ([block.rows(value) for value in values] for block in (found.scores, found.boxes))
    whole = _finite(scores, "class outputs"), _finite(boxes, "boxes")
    why: list[str] = []
    logits, width, activation = found.scores, scores[0].shape[1], asked.activation
    probabilities = are_probabilities(whole[0])
    logarithms = bool(whole[0].max() <= 0)
    powers = [np.exp(one.astype(np.float64)) for one in scores] if logarithms else scores
    traced = logits_of(powers, inner[0], values) if probabilities or logarithms else None
    bent = None if traced is not None or asked.activation else bent_by(graph, found.scores.tensor)
    if traced is not None:
        logits, activation, width = traced
        _agreed(asked.activation, activation)
        probabilities = True
        why.append(
            f"class outputs are {'the logarithm of ' if logarithms else ''}the {activation} of tensor "
            f"{logits.tensor!r}, which is taken as the logits"
        )
    elif bent is not None and not probabilities:
        raise ExportError(
            f"the class outputs {found.scores.tensor!r} are what {bent} gives, and no logits were found "
            "on the way to them; expected class logits: export the model without its post-processing; or "
            "say that they are logits: --activation sigmoid or --activation softmax"
        )
    elif probabilities and asked.activation is None:
        raise ExportError(
            f"the class outputs {found.scores.tensor!r} lie in 0..1, and no Sigmoid or Softmax was found "
            "on the way to them; expected class logits: export the model without its post-processing; or "
            "say that they are logits: --activation sigmoid or --activation softmax"
        )
    else:
        probabilities = False
        why.append(
            "class outputs are logits: "
            + (
                f"they go from {whole[0].min():.3g} to {whole[0].max():.3g}"
                if asked.activation is None
                else "--activation says so"
            )
        )
    it = _boxes(graph, found.boxes, whole[1], boxes, inner[1], values, factors, asked)
    return Understood(
        found,
        logits,
        it.block,
        len(boxes[0]),
        width,
        activation,
        it.form,
        it.layouts,
        it.decided,
        it.given,
        probabilities,
        (*why, it.why),
        logarithms=logarithms and traced is not None,
    )


@dataclass(frozen=True)
class _Boxes:
    """The fields of Understood that are about boxes."""

    block: Block
    form: BoxForm
    given: BoxForm
    layouts: tuple[Layout, ...]
    decided: bool
    why: str


def _boxes(
    graph: GraphIndex,
    output: Block,
    whole: np.ndarray,
    boxes: list[np.ndarray],
    inner: list[str],
    values: Values,
    factors: list[Pair],
    asked: Asked,
) -> _Boxes:
    """What is known of boxes that are an output."""
    traced = conversion_of(boxes, inner, values, factors) or conversion_of(boxes, inner, values, factors[1:], same=True)
    if traced is not None:
        it = _traced(traced, np.concatenate([traced.block.rows(value) for value in values]), factors, asked)
        # Where the file gives our own form as a tensor of its own (D-FINE), that tensor is taken as it is.
        ours = it.given == BoxForm() and output.columns is None
        return replace(it, block=output, form=it.given, layouts=("cxcywh",)) if ours and not traced.same else it
    swapped = [rows[:, [1, 0, 3, 2]] for rows in boxes]
    same = np.allclose(np.concatenate(swapped), np.concatenate(boxes), atol=1e-3)  # x = y everywhere
    turned = (
        None
        if asked.boxes or same
        else (
            conversion_of(swapped, inner, values, factors) or conversion_of(swapped, inner, values, factors, same=True)
        )
    )
    if turned is not None:
        raise ExportError(
            f"the boxes {output.tensor!r} are those of tensor {turned.block.tensor!r} with x and y "
            "swapped, so either may be (y, x); expected x first: export the model with boxes as cx, cy, "
            "w, h; or say that x is first here: --boxes cxcywh, or another of "
            f"{', '.join(box_format.OPTIONS)}"
        )
    pixels = asked.boxes.endswith("-pixels") if asked.boxes else box_format.in_pixels(whole)
    unit = factors[1] if pixels else (1.0, 1.0)
    fits = _layouts(whole / np.array(unit * 2), asked)
    if not fits.decided and ends_in_sigmoid(graph, output.tensor):
        fits = Fitting(("cxcywh",), True, "they come straight out of a Sigmoid, which keeps no two corners in order")
    form = BoxForm(fits.layouts[0], unit)
    return _Boxes(output, form, form, fits.layouts, fits.decided, f"{form.words()}: {fits.why}")


def _traced(found: Conversion, rows: np.ndarray, factors: list[Pair], asked: Asked) -> _Boxes:
    """The same of boxes that the graph makes from a tensor with these rows."""
    unit = factors[1] if box_format.in_pixels(rows) else (1.0, 1.0)
    outer = unit[0] * found.factor[0], unit[1] * found.factor[1]
    if found.same:
        fits = _layouts(rows / np.array(unit * 2), asked)
        form, given = BoxForm(fits.layouts[0], unit), BoxForm(fits.layouts[0], outer)
        return _Boxes(found.block, form, given, fits.layouts, fits.decided, f"{given.words()}: {fits.why}")
    form, given = BoxForm(found.source, unit), BoxForm(found.target, outer)
    if asked.boxes not in (None, given.option):
        raise UsageError(f"--boxes {asked.boxes}: the graph makes boxes as {given.option}; leave --boxes out")
    return _Boxes(
        found.block,
        form,
        given,
        (form.layout,),
        True,
        (
            f"{given.words()}: the graph makes them from tensor {found.block.tensor!r}, which holds "
            f"{box_format.WORDS[form.layout]}"
        ),
    )


def _layouts(shares: np.ndarray, asked: Asked) -> Fitting:
    if asked.boxes:
        layout = next(name for name in box_format.LAYOUTS if asked.boxes.startswith(name))
        box_format.require(shares, layout)
        return Fitting((layout,), True, "--boxes says so")
    return box_format.fitting(shares)


def _chosen(
    model: ModelProto, graph: GraphIndex, feeds: Feeds, found: Chosen, factors: list[Pair], asked: Asked
) -> Understood:
    inner = [matrices(graph, name) for name in (found.scores[0], found.boxes[0])]
    outputs = [found.labels[0], found.scores[0], found.boxes[0]]
    values = run(model, list(dict.fromkeys([*inner[0], *inner[1], *outputs])), feeds)
    answers = [found.rows(value) for value in values]
    tried = 0
    for selection in selections(answers, inner[0], values):
        tried += 1
        match = boxes_of(selection, answers, inner[1], values, factors)
        if match is None:
            continue
        _agreed(asked.activation, selection.activation)
        rows = _finite([match.block.rows(value) for value in values], "boxes")
        it = _traced(match, rows, factors, asked)
        reasons = [
            f"scores are the {selection.activation} of tensor {selection.logits.tensor!r}, "
            + ("the best of all" if selection.rule == "all" else "the best class of each query"),
            it.why,
        ]
        moved = {ours: theirs for ours, theirs in selection.labels.items() if ours != theirs}
        if moved:
            listed = ", ".join(f"{ours} as {theirs}" for ours, theirs in list(moved.items())[:3])
            reasons.append(
                f"the file numbers its labels otherwise ({listed}): classes stand here in the order of the logits"
            )
        if selection.rule == "query" and selection.activation == "sigmoid":
            reasons.append(
                "the file keeps one class of each query, the bundle the best of all: an object may get a "
                "second class, of a lower score"
            )
        counts = {len(answer.scores) for answer in answers}
        top_k = counts.pop() if counts != {0} and len(counts) == 1 else None
        return Understood(
            found,
            selection.logits,
            it.block,
            len(rows) // len(values),
            selection.width,
            selection.activation,
            it.form,
            it.layouts,
            it.decided,
            it.given,
            True,
            tuple(reasons),
            selection.labels,
            selection.rule,
            top_k,
        )
    if not tried:
        what = "no tensor was found whose sigmoid or softmax gives the file's own scores and labels"
    else:
        what = "no tensor that may be the boxes gives the file's own"
    raise ExportError(
        f"the file's decoding is not understood: {what}; expected the decoding of RT-DETR or D-FINE (the "
        "best scores, boxes as corners); export the model without its post-processing, so that logits "
        "and boxes are its outputs"
    )


def _finite(rows: Sequence[np.ndarray], what: str) -> np.ndarray:
    every = np.concatenate(rows)
    if not np.isfinite(every).all():
        raise ExportError(
            f"the {what} have NaN or infinity on an image; expected finite numbers: check --scale, "
            "--mean and --std, and the file itself"
        )
    return every


def _agreed(asked: str | None, found: str) -> None:
    if asked not in (None, found):
        raise UsageError(f"--activation {asked}: the file itself applies {found} to its class logits; leave it out")
