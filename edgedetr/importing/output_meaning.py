"""What a file's outputs mean: found in the graph if it computes them from logits and boxes, else from their values.

What stays open is left to disambiguation.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from edgedetr.errors import ExportError, UsageError
from edgedetr.importing import output_formats
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.io_contract import DenseOutputs, SelectedOutputs, SelectedRows, Values, classify_outputs
from edgedetr.importing.output_formats import (
    ACTIVATIONS,
    Activation,
    BoxFormat,
    Layout,
    LayoutFit,
    apply_activation,
    are_probabilities,
)
from edgedetr.importing.output_tracing import (
    TOLERANCE,
    BoxConversion,
    TensorSlice,
    as_matrix,
    ends_in_sigmoid,
    find_box_conversion,
    find_logits,
    match_conversion,
    nonlinearity_behind,
    run_graph,
    upstream_matrices,
)
from edgedetr.onnx_graph.index import GraphIndex

Feeds = Sequence[dict[str, np.ndarray]]
Pair = tuple[float, float]
GAP = 1e-6  # between scores; objects that are closer may be in either order


@dataclass(frozen=True)
class OutputMeaning:
    """Where the graph has class logits and boxes of all queries, and what is known of their meaning.

    outputs        the file's own outputs
    logits, boxes  tensors of the graph with all `queries`; `width` logits each
    activation     None if the graph does not contain it
    box_format     of `boxes`
    layouts        of `boxes` that fit, that of box_format first;  decided: whether it is clearly the best
    output_format  of the boxes in the file's own output
    has_probabilities      whether the file's own scores are probabilities;  has_log_probabilities: logarithms of them
    reasons        a sentence for each thing that was found
    labels         if the file selects objects: its label for each class
    rule           "all", or "query" if it keeps one class of each query
    top_k          number of objects that it selects; None if it gives all queries
    """

    outputs: DenseOutputs | SelectedOutputs
    logits: TensorSlice
    boxes: TensorSlice
    queries: int
    width: int
    activation: Activation | None
    box_format: BoxFormat
    layouts: tuple[Layout, ...]
    decided: bool
    output_format: BoxFormat
    has_probabilities: bool
    reasons: tuple[str, ...]
    labels: dict[int, int] | None = None
    rule: str = "all"
    top_k: int | None = None
    has_log_probabilities: bool = False

    def with_layout(self, layout: Layout) -> OutputMeaning:
        """The same with one of the layouts that fit."""
        kept = self.output_format.layout == self.box_format.layout  # the graph converts nothing
        return replace(
            self,
            box_format=replace(self.box_format, layout=layout),
            layouts=(layout,),
            decided=True,
            output_format=replace(self.output_format, layout=layout) if kept else self.output_format,
        )


def find_output_meaning(
    model: ModelProto, graph: GraphIndex, feeds: Feeds, options: ImportOptions, original_side: int
) -> OutputMeaning:
    """The meaning of a graph's outputs at its fixed size.

    feeds          inputs of some images
    original_side  value of the input for the size of the original image
    Errors: ExportError for outputs that are not understood, UsageError for options that contradict the graph.
    """
    names = [item.name for item in model.graph.output]
    values = run_graph(model, names, feeds)
    faults = [name for name in names for value in values if not np.isfinite(value[name]).all()]
    if faults:
        raise ExportError(
            f"output {faults[0]} has NaN or infinity on an image; expected finite numbers: check "
            "--scale, --mean and --std, and the file itself"
        )
    outputs = classify_outputs(graph, names, values, options.outputs)
    image = next(value for value in feeds[0].values() if value.ndim == 4)
    sides = float(image.shape[3]), float(image.shape[2])
    factors = [(1.0, 1.0), sides, (float(original_side), float(original_side))]
    if isinstance(outputs, SelectedOutputs):
        return _selected_meaning(model, graph, feeds, outputs, factors, options)
    return _dense_meaning(model, graph, feeds, outputs, factors, options)


def _dense_meaning(
    model: ModelProto,
    graph: GraphIndex,
    feeds: Feeds,
    outputs: DenseOutputs,
    factors: list[Pair],
    options: ImportOptions,
) -> OutputMeaning:
    """The meaning of outputs that have class scores and boxes of all queries."""
    inner = [upstream_matrices(graph, rows.tensor) for rows in (outputs.scores, outputs.boxes)]
    tensors = list(dict.fromkeys([*inner[0], *inner[1], outputs.scores.tensor, outputs.boxes.tensor]))
    values = run_graph(model, tensors, feeds)
    scores, boxes = ([rows.rows(value) for value in values] for rows in (outputs.scores, outputs.boxes))
    all_scores, all_boxes = _finite(scores, "class outputs"), _finite(boxes, "boxes")
    logits, width, activation = outputs.scores, scores[0].shape[1], options.activation
    has_probabilities = are_probabilities(all_scores)
    has_logarithms = bool(all_scores.max() <= 0)
    powers = [np.exp(one.astype(np.float64)) for one in scores] if has_logarithms else scores
    traced = find_logits(powers, inner[0], values) if has_probabilities or has_logarithms else None
    if traced is not None:
        logits, activation, width = traced
        _require_agreement(options.activation, activation)
        has_probabilities = True
        reason = (
            f"class outputs are {'the logarithm of ' if has_logarithms else ''}the {activation} of tensor "
            f"{logits.tensor!r}, which is taken as the logits"
        )
    else:
        if options.activation is None:
            _require_logits(graph, outputs.scores.tensor, has_probabilities)
            reason = f"class outputs are logits: they go from {all_scores.min():.3g} to {all_scores.max():.3g}"
        else:
            reason = "class outputs are logits: --activation says so"
        has_probabilities = False
    found = _box_meaning(graph, outputs.boxes, all_boxes, boxes, inner[1], values, factors, options)
    return OutputMeaning(
        outputs,
        logits,
        found.boxes,
        len(boxes[0]),
        width,
        activation,
        found.box_format,
        found.layouts,
        found.decided,
        found.output_format,
        has_probabilities,
        (reason, found.reason),
        has_log_probabilities=has_logarithms and traced is not None,
    )


def _require_logits(graph: GraphIndex, scores: str, has_probabilities: bool) -> None:
    """ExportError if class outputs, of which no logits were found, are the result of an activation."""
    operator = nonlinearity_behind(graph, scores)
    if has_probabilities:
        raise ExportError(
            f"the class outputs {scores!r} lie in 0..1, and no Sigmoid or Softmax was found "
            "on the way to them; expected class logits: export the model without its post-processing; or "
            "say that they are logits: --activation sigmoid or --activation softmax"
        )
    if operator is not None:
        raise ExportError(
            f"the class outputs {scores!r} are what {operator} gives, and no logits were found "
            "on the way to them; expected class logits: export the model without its post-processing; or "
            "say that they are logits: --activation sigmoid or --activation softmax"
        )


@dataclass(frozen=True)
class _BoxMeaning:
    """The fields of OutputMeaning that are about boxes."""

    boxes: TensorSlice
    box_format: BoxFormat
    output_format: BoxFormat
    layouts: tuple[Layout, ...]
    decided: bool
    reason: str


def _box_meaning(
    graph: GraphIndex,
    output: TensorSlice,
    all_boxes: np.ndarray,
    boxes: list[np.ndarray],
    inner: list[str],
    values: Values,
    factors: list[Pair],
    options: ImportOptions,
) -> _BoxMeaning:
    """What is known of an output that has the boxes of all queries."""
    traced = find_box_conversion(boxes, inner, values, factors) or find_box_conversion(
        boxes, inner, values, factors[1:], same=True
    )
    if traced is not None:
        found = _traced_boxes(traced, np.concatenate([traced.boxes.rows(value) for value in values]), factors, options)
        # If the output already has the format of a bundle (D-FINE), it is taken itself.
        is_ours = found.output_format == BoxFormat() and output.columns is None
        if is_ours and not traced.keeps_layout:
            return replace(found, boxes=output, box_format=found.output_format, layouts=("cxcywh",))
        return found
    swapped = [rows[:, [1, 0, 3, 2]] for rows in boxes]
    same = np.allclose(np.concatenate(swapped), np.concatenate(boxes), atol=1e-3)  # x = y everywhere
    if not options.boxes and not same:
        source = find_box_conversion(swapped, inner, values, factors) or find_box_conversion(
            swapped, inner, values, factors, same=True
        )
        if source is not None:
            raise ExportError(
                f"the boxes {output.tensor!r} are those of tensor {source.boxes.tensor!r} with x and y "
                "swapped, so either may be (y, x); expected x first: export the model with boxes as cx, cy, "
                "w, h; or say that x is first here: --boxes cxcywh, or another of "
                f"{', '.join(output_formats.BOX_FORMATS)}"
            )
    in_pixels = options.boxes.endswith("-pixels") if options.boxes else output_formats.are_pixels(all_boxes)
    unit = factors[1] if in_pixels else (1.0, 1.0)
    fit = _fit_layouts(all_boxes / np.array(unit * 2), options)
    if not fit.decided and ends_in_sigmoid(graph, output.tensor):
        fit = LayoutFit(("cxcywh",), True, "they come straight out of a Sigmoid, which keeps no two corners in order")
    box_format = BoxFormat(fit.layouts[0], unit)
    reason = f"{box_format.describe()}: {fit.reason}"
    return _BoxMeaning(output, box_format, box_format, fit.layouts, fit.decided, reason)


def _traced_boxes(found: BoxConversion, rows: np.ndarray, factors: list[Pair], options: ImportOptions) -> _BoxMeaning:
    """What is known of boxes that the graph converts from a tensor with these rows."""
    unit = factors[1] if output_formats.are_pixels(rows) else (1.0, 1.0)
    outer = unit[0] * found.factor[0], unit[1] * found.factor[1]
    if found.keeps_layout:
        fit = _fit_layouts(rows / np.array(unit * 2), options)
        inside, outside = BoxFormat(fit.layouts[0], unit), BoxFormat(fit.layouts[0], outer)
        reason = f"{outside.describe()}: {fit.reason}"
        return _BoxMeaning(found.boxes, inside, outside, fit.layouts, fit.decided, reason)
    inside, outside = BoxFormat(found.source, unit), BoxFormat(found.target, outer)
    if options.boxes not in (None, outside.option):
        raise UsageError(f"--boxes {options.boxes}: the graph makes boxes as {outside.option}; leave --boxes out")
    reason = (
        f"{outside.describe()}: the graph makes them from tensor {found.boxes.tensor!r}, which holds "
        f"{output_formats.LAYOUT_DESCRIPTIONS[inside.layout]}"
    )
    return _BoxMeaning(found.boxes, inside, outside, (inside.layout,), True, reason)


def _fit_layouts(fractions: np.ndarray, options: ImportOptions) -> LayoutFit:
    """Layouts of boxes [..., 4] in fractions of the image: as --boxes says, else those that fit."""
    if options.boxes:
        layout = next(name for name in output_formats.LAYOUTS if options.boxes.startswith(name))
        output_formats.require_layout(fractions, layout)
        return LayoutFit((layout,), True, "--boxes says so")
    return output_formats.fit_layouts(fractions)


def _selected_meaning(
    model: ModelProto,
    graph: GraphIndex,
    feeds: Feeds,
    outputs: SelectedOutputs,
    factors: list[Pair],
    options: ImportOptions,
) -> OutputMeaning:
    """The meaning of outputs that have the objects which the graph selects."""
    inner = [upstream_matrices(graph, name) for name in (outputs.scores[0], outputs.boxes[0])]
    own = [outputs.labels[0], outputs.scores[0], outputs.boxes[0]]
    values = run_graph(model, list(dict.fromkeys([*inner[0], *inner[1], *own])), feeds)
    selected = [outputs.rows(value) for value in values]
    any_rule = False
    for rule in find_selection_rules(selected, inner[0], values):
        any_rule = True
        conversion = find_selected_boxes(rule, selected, inner[1], values, factors)
        if conversion is None:
            continue
        _require_agreement(options.activation, rule.activation)
        rows = _finite([conversion.boxes.rows(value) for value in values], "boxes")
        found = _traced_boxes(conversion, rows, factors, options)
        counts = {len(one.scores) for one in selected}
        return OutputMeaning(
            outputs,
            rule.logits,
            found.boxes,
            len(rows) // len(values),
            rule.width,
            rule.activation,
            found.box_format,
            found.layouts,
            found.decided,
            found.output_format,
            True,
            tuple(_selection_reasons(rule, found)),
            rule.labels,
            rule.rule,
            counts.pop() if counts != {0} and len(counts) == 1 else None,
        )
    if any_rule:
        what = "no tensor that may be the boxes gives the file's own"
    else:
        what = "no tensor was found whose sigmoid or softmax gives the file's own scores and labels"
    raise ExportError(
        f"the file's decoding is not understood: {what}; expected the decoding of RT-DETR or D-FINE (the "
        "best scores, boxes as corners); export the model without its post-processing, so that logits "
        "and boxes are its outputs"
    )


def _selection_reasons(rule: SelectionRule, found: _BoxMeaning) -> list[str]:
    reasons = [
        f"scores are the {rule.activation} of tensor {rule.logits.tensor!r}, "
        + ("the best of all" if rule.rule == "all" else "the best class of each query"),
        found.reason,
    ]
    moved = {ours: theirs for ours, theirs in rule.labels.items() if ours != theirs}
    if moved:
        listed = ", ".join(f"{ours} as {theirs}" for ours, theirs in list(moved.items())[:3])
        reasons.append(
            f"the file numbers its labels otherwise ({listed}): the bundle's classes are in the order of the logits"
        )
    if rule.rule == "query" and rule.activation == "sigmoid":
        reasons.append(
            "the file keeps one class of each query, the bundle the best of all: an object may get a "
            "second class, of a lower score"
        )
    return reasons


@dataclass(frozen=True)
class SelectionRule:
    """How a graph selects its objects from all queries.

    logits      of all queries, `width` columns
    rule        "all": the best of queries x classes; "query": the best class of each query
    labels      the file's label for each class that it selected
    queries     by image: the query of each object [n]
    distinct    by image: whether an object's score differs from its neighbors' [n]; the others may be in any order
    """

    logits: TensorSlice
    activation: Activation
    width: int
    rule: str
    labels: dict[int, int]
    queries: tuple[np.ndarray, ...]
    distinct: tuple[np.ndarray, ...]


def find_selection_rules(
    selected: Sequence[SelectedRows], names: Sequence[str], values: Sequence[dict[str, np.ndarray]]
) -> Iterator[SelectionRule]:
    """Every tensor and rule that gives the file's own scores and labels, the nearest to the output first.

    selected   the file's objects in some images
    names      tensors that may be the logits;  values  of them, by image
    """
    for name in names:
        if len(as_matrix(values[0][name]).shape) != 2:
            continue
        for transposed in (False, True):
            rows = TensorSlice(name, transposed)
            logits = [rows.rows(value) for value in values]
            for activation in ACTIVATIONS:
                for rule in ("all", "query") if activation == "sigmoid" else ("query",):
                    found = _check_rule(selected, rows, logits, activation, rule)
                    if found is not None:
                        yield found


def _check_rule(
    selected: Sequence[SelectedRows], rows: TensorSlice, logits: Sequence[np.ndarray], activation: Activation, rule: str
) -> SelectionRule | None:
    """The rule applied to the logits [N, K] of some images, if it selects the file's objects; else None."""
    labels: dict[int, int] = {}
    queries, distinct = [], []
    for objects, one in zip(selected, logits):
        scores = apply_activation(one, activation)
        scores = scores[:, :-1] if activation == "softmax" else scores
        count = len(objects.scores)
        if not scores.shape[1] or (scores.size if rule == "all" else len(scores)) < count:
            return None
        candidates = (
            scores if rule == "all" else np.where(np.arange(scores.shape[1]) == scores.argmax(1)[:, None], scores, -1)
        )
        order = np.argsort(-candidates, axis=None, kind="stable")[: count + 1]
        falling = candidates.reshape(-1)[order]
        if np.abs(falling[:count] - objects.scores).max(initial=0) > TOLERANCE:
            return None
        gaps = np.concatenate([[np.inf], -np.diff(falling), [np.inf]])
        clear = (gaps[:count] > GAP) & (gaps[1 : count + 1] > GAP)
        query, column = np.unravel_index(order[:count], scores.shape)
        for ours, theirs in zip(column[clear].tolist(), objects.labels[clear].tolist()):
            if labels.setdefault(ours, theirs) != theirs:
                return None
        queries.append(query)
        distinct.append(clear)
    if len(set(labels.values())) < len(labels) or not any(clear.any() for clear in distinct):
        return None
    return SelectionRule(rows, activation, logits[0].shape[1], rule, labels, tuple(queries), tuple(distinct))


def find_selected_boxes(
    rule: SelectionRule,
    selected: Sequence[SelectedRows],
    names: Sequence[str],
    values: Sequence[dict[str, np.ndarray]],
    factors: Sequence[tuple[float, float]],
) -> BoxConversion | None:
    """The tensor whose rows, at the selected queries, become the file's boxes; None if no tensor fits."""
    count = len(rule.logits.rows(values[0]))
    given = np.concatenate([one.boxes[clear] for one, clear in zip(selected, rule.distinct)]).astype(np.float64)
    unconverted: BoxConversion | None = None
    for name in names:
        shape = as_matrix(values[0][name]).shape
        for transposed in (False, True):
            if len(shape) != 2 or (shape[::-1] if transposed else shape) != (count, 4):
                continue
            rows = TensorSlice(name, transposed)
            inner = np.concatenate(
                [rows.rows(value)[query][clear] for value, query, clear in zip(values, rule.queries, rule.distinct)]
            )
            converted = match_conversion(inner, given, factors)
            if converted is not None:
                return BoxConversion(rows, *converted)
            if unconverted is None:
                same = match_conversion(inner, given, factors, same=True)
                unconverted = None if same is None else BoxConversion(rows, *same)
    return unconverted


def _finite(rows: Sequence[np.ndarray], what: str) -> np.ndarray:
    """Rows of all images; ExportError unless they are finite."""
    joined = np.concatenate(rows)
    if not np.isfinite(joined).all():
        raise ExportError(
            f"the {what} have NaN or infinity on an image; expected finite numbers: check --scale, "
            "--mean and --std, and the file itself"
        )
    return joined


def _require_agreement(asked: str | None, found: str) -> None:
    if asked not in (None, found):
        raise UsageError(f"--activation {asked}: the file itself applies {found} to its class logits; leave it out")
