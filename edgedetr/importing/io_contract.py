"""Read a detector's ONNX file, and find out what each of its inputs and outputs is.

Outputs are recognized by their shapes and their values on images; their names count only if several outputs fit.

raw       class scores [B, N, K] and boxes [B, N, 4] of every query (transformers, RF-DETR)
joined    both in one tensor: [B, N, 4 + K] or [B, 4 + K, N] (ultralytics)
decoded   the selected objects: labels, boxes, scores [B, n], or one tensor [B, n, 6] that holds all of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.inliner import inline_local_functions

from edgedetr.errors import ExportError, UsageError, first_line
from edgedetr.importing.image_processor import PROCESSOR
from edgedetr.importing.output_formats import are_probabilities
from edgedetr.importing.output_tracing import TensorSlice, as_matrix
from edgedetr.onnx_graph.graph_edit import sort_nodes
from edgedetr.onnx_graph.index import GraphIndex, type_name
from edgedetr.onnx_graph.io import open_onnx, tensors

LARGEST_SIDE = 8192  # pixels; images and tensors of a larger input would not fit into memory


def read_model(path: Path) -> ModelProto:
    """The file's graph, checked, with standard ONNX operators only. Weights in plain files next to it are read.

    Errors: ExportError for damaged, quantized or non-standard files.
    """
    opened = open_onnx(path)
    if opened.faults:
        raise ExportError(
            f"{path}: {opened.faults[0]}; expected weights in the file, or in a plain file next to it; "
            "copy both into one folder (cp -L follows links)"
        )
    model = opened.model
    if not model.graph.output:
        raise ExportError(f"{path}: the graph has no outputs; expected those of a detector; export the model again")
    if model.graph.sparse_initializer:
        raise ExportError(
            f"{path}: {len(model.graph.sparse_initializer)} sparse weights; expected dense ones; export "
            "the model without sparsity"
        )
    try:
        sort_nodes(model)
        if model.functions:
            model = inline_local_functions(model)
        open_outputs = [
            item.type.tensor_type
            for item in model.graph.output
            if item.type.HasField("tensor_type") and not item.type.tensor_type.HasField("shape")
        ]
        for kind in open_outputs:  # the checker requires a shape, even an empty one
            kind.shape.SetInParent()
        onnx.checker.check_model(model)
        for kind in open_outputs:
            kind.ClearField("shape")
    except Exception as error:  # C++ errors of several kinds, and protobuf's own
        raise ExportError(f"{path}: not valid ONNX ({first_line(error)}); export the model again") from error
    _require_values(model, path)
    graph = GraphIndex(model)
    others = sorted(
        {f"{node.op_type} ({node.domain})" for node in graph.all_nodes if node.domain not in ("", "ai.onnx")}
    )
    if others:
        raise ExportError(
            f"{path}: operators that are not ONNX's own: {', '.join(others[:5])}; expected a float32 "
            "export without fused or custom operators (no plugins, no optimized model)"
        )
    quantized = [
        node.op_type
        for node in graph.all_nodes
        if node.op_type.endswith(("QuantizeLinear", "Integer")) or node.op_type.startswith("QLinear")
    ]
    if quantized:
        raise ExportError(
            f"{path}: quantized already ({len(quantized)} nodes like {quantized[0]}); expected the "
            "float32 model, which edgedetr export --int8 quantizes"
        )
    return model


def _require_values(model: ModelProto, path: Path) -> None:
    """ExportError where a tensor's data does not fit its type and shape, which the checker does not test."""
    for tensor in tensors(model):
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:  # ValueError, TypeError, KeyError, and protobuf's own
            raise ExportError(
                f"{path}: tensor {tensor.name!r} is damaged ({first_line(error)}); export the model again"
            ) from error


@dataclass(frozen=True)
class GraphInputs:
    """Names of the graph's inputs.

    image   [B, 3, H, W]
    sizes   [B, 2] size of the original image, or ""
    mask    [B, H, W] which pixels are not padding, or ""
    """

    image: str
    sizes: str = ""
    mask: str = ""


def classify_inputs(model: ModelProto) -> GraphInputs:
    """Which input is which. ExportError, which lists them, where that is not clear."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for item in model.graph.input:
        if item.type.WhichOneof("value") != "tensor_type":
            raise ExportError(f"input {item.name!r} is no tensor; {_EXPECTED_INPUTS}")
    found: dict[str, list[str]] = {"image": [], "sizes": [], "mask": []}
    for item in model.graph.input:
        if item.name in constants:
            continue
        rank, kind = len(item.type.tensor_type.shape.dim), item.type.tensor_type.elem_type
        if rank == 4:
            found["image"].append(item.name)
            if kind != TensorProto.FLOAT:
                raise ExportError(
                    f"input {item.name!r} is {type_name(kind)}; expected float32 images: export the "
                    "float32 model, normalized outside the graph"
                )
        elif rank == 2 and (item.type.tensor_type.shape.dim[1].dim_value in (0, 2)):
            found["sizes"].append(item.name)
        elif rank == 3 and "mask" in item.name:
            found["mask"].append(item.name)
        else:
            raise ExportError(f"input {_signature(item)} is not known; {_EXPECTED_INPUTS}")
    if len(found["image"]) != 1 or len(found["sizes"]) > 1 or len(found["mask"]) > 1:
        listed = ", ".join(_signature(item) for item in model.graph.input if item.name not in constants)
        raise ExportError(f"the graph takes {listed or 'nothing'}; {_EXPECTED_INPUTS}")
    return GraphInputs(found["image"][0], *(next(iter(found[name]), "") for name in ("sizes", "mask")))


def fixed_size(model: ModelProto, image: str) -> tuple[int | None, int | None]:
    """Height and width that the file is fixed to; None if open. ExportError if its input is no batch of RGB images."""
    item = next(item for item in model.graph.input if item.name == image)
    batch, channels, height, width = (
        size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else None
        for size in item.type.tensor_type.shape.dim
    )
    if channels not in (None, 3):
        raise ExportError(
            f"input {_signature(item)} has {channels} channels in its second dimension; expected RGB "
            "images [B, 3, H, W]; export the model with channels first"
        )
    if batch not in (None, 1):
        raise ExportError(
            f"input {_signature(item)} takes {batch} images at a time; expected 1 or an open batch: "
            "export the model with batch size 1"
        )
    return height, width


def input_size(
    model: ModelProto, image: str, asked: tuple[int, int] | None, preferred: tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) of the input: as asked, else as preferred where that fits, else as the file is fixed to.

    asked      by the user; UsageError if the file is fixed to another size
    preferred  by the image processor next to the file
    """
    fixed = fixed_size(model, image)
    if asked is not None and any(one not in (None, two) for one, two in zip(fixed, asked)):
        raise UsageError(
            f"--input is {asked[0]}x{asked[1]}; the file takes {fixed[0] or '?'}x{fixed[1] or '?'} alone; "
            "leave --input out, or export the model with an open size"
        )
    fits = preferred is not None and all(one in (None, two) for one, two in zip(fixed, preferred))
    height, width = asked or (preferred if fits and preferred else fixed)
    if height is None or width is None:
        raise UsageError(
            f"the file leaves height and width open, and no {PROCESSOR} next to it gives them; say which to "
            "use: --input 640x640 (height x width)"
        )
    if max(height, width) > LARGEST_SIDE:
        raise ExportError(
            f"the input is {height} x {width}; expected at most {LARGEST_SIDE} pixels a side; export the "
            "model for a smaller one"
        )
    return height, width


def dtype_of(model: ModelProto, name: str) -> np.dtype:
    """NumPy type of an input."""
    kind = next(item.type.tensor_type.elem_type for item in model.graph.input if item.name == name)
    return onnx.helper.tensor_dtype_to_np_dtype(kind)


def _signature(item: ValueInfoProto) -> str:
    shape = ", ".join(size.dim_param or str(size.dim_value or "?") for size in item.type.tensor_type.shape.dim)
    return f"{item.name} {type_name(item.type.tensor_type.elem_type)} [{shape}]"


_EXPECTED_INPUTS = (
    "expected images float32 [B, 3, H, W], and besides them at most orig_target_sizes [B, 2] and "
    "pixel_mask [B, H, W]; export the detector with these inputs alone"
)


# Names of class scores and boxes in libraries; used only if several pairs fit by shape.
PAIRS = (
    ("logits", "pred_boxes"),
    ("pred_logits", "pred_boxes"),
    ("labels", "dets"),
    ("scores", "boxes"),
    ("pred_logits", "boxes"),
    ("logits", "boxes"),
)
Values = Sequence[dict[str, np.ndarray]]  # for each image: tensors by name
Column = tuple[str, "int | None"]  # a tensor, and which of its columns


@dataclass(frozen=True)
class DenseOutputs:
    """Class scores and boxes of every query. kind is "raw" or "joined"."""

    kind: str
    scores: TensorSlice
    boxes: TensorSlice


@dataclass(frozen=True)
class SelectedOutputs:
    """The objects that the graph itself selects: labels, scores, and the first of the four columns of boxes."""

    labels: Column
    scores: Column
    boxes: tuple[str, int]
    kind: str = "decoded"

    def rows(self, values: dict[str, np.ndarray]) -> SelectedRows:
        """Objects of one image, in order of falling score."""
        name, first = self.boxes
        scores, labels = (_column(values, ref) for ref in (self.scores, self.labels))
        order = np.argsort(-scores, kind="stable")
        return SelectedRows(
            labels[order].astype(np.int64), as_matrix(values[name])[order, first : first + 4], scores[order]
        )


@dataclass(frozen=True)
class SelectedRows:
    """labels [n] int64, boxes [n, 4] in the file's own format, scores [n] in falling order."""

    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def classify_outputs(
    graph: GraphIndex, names: Sequence[str], values: Values, asked: Sequence[str] = ()
) -> DenseOutputs | SelectedOutputs:
    """What the outputs are. ExportError, which lists them, if no form fits or several do.

    values  outputs of some images
    asked   names of the outputs to use, if the user gives them
    """
    lost = [name for name in asked if name not in names]
    if lost:
        raise UsageError(
            f"--outputs {','.join(asked)}: the file has no output {lost[0]!r}; expected some of {', '.join(names)}"
        )
    used = list(asked) or list(names)
    shapes = {name: as_matrix(values[0][name]).shape for name in used}
    if len(asked) == 2:
        pairs = [(asked[0], asked[1])]
    else:
        pairs = [(one, other) for one in used for other in used if one != other and _is_pair(shapes, one, other)]
        pairs = [pair for pair in pairs if _may_be_boxes(pair[1], values)]
    selected = _find_selected(used, values) if len(asked) != 2 else None
    if selected is not None:
        return selected
    if len(pairs) > 1:
        pairs = _filter_by_name(pairs)
    if len(pairs) == 1 and _is_pair(shapes, *pairs[0]):
        return DenseOutputs("raw", TensorSlice(pairs[0][0]), TensorSlice(pairs[0][1]))
    if len(pairs) > 1:
        listed = " or ".join(f"--outputs {one},{other}" for one, other in pairs[:4])
        raise ExportError(f"{len(pairs)} pairs of outputs may be classes and boxes; say which: {listed}")
    if len(used) == 1 and len(shapes[used[0]]) == 2:
        found = _split_joined(graph, used[0], values)
        if found is not None:
            return found
    listed = ", ".join(f"{name} {list(values[0][name].shape)}" for name in names)
    raise ExportError(
        f"the graph gives {listed}; expected one of: logits [B, N, K] and boxes [B, N, 4]; labels, "
        "boxes, scores [B, n]; or one [B, N, 4 + K], [B, 4 + K, N] or [B, n, 6]; export the detector "
        "without other outputs, or name those that count: --outputs CLASSES,BOXES"
    )


def _column(values: dict[str, np.ndarray], ref: Column) -> np.ndarray:
    name, column = ref
    return values[name].reshape(-1) if column is None else as_matrix(values[name])[:, column]


def _is_pair(shapes: dict[str, tuple[int, ...]], scores: str, boxes: str) -> bool:
    one, other = shapes[scores], shapes[boxes]
    return len(one) == len(other) == 2 and one[0] == other[0] and other[1] == 4


def _may_be_boxes(name: str, values: Values) -> bool:
    """Whether width and height are positive in some box format, and the four numbers do not sum to 1 (softmax)."""
    boxes = np.concatenate([as_matrix(value[name]) for value in values])
    ordered = max((boxes[:, 2:] >= -1e-4).mean(), (boxes[:, 2:] - boxes[:, :2] >= -1e-4).mean()) > 0.98
    return bool(ordered) and not bool(np.abs(boxes.sum(1) - 1).max() < 1e-3)


def _filter_by_name(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    lower = {(one.lower(), other.lower()): (one, other) for one, other in pairs}
    named = next((lower[pair] for pair in PAIRS if pair in lower), None)
    return pairs if named is None else [named]


def _find_selected(names: Sequence[str], values: Values) -> SelectedOutputs | None:
    """labels, boxes and scores as separate outputs; or boxes with a score in one output [n, 5], and labels."""
    flat = [name for name in names if _is_flat(values[0][name])]
    for boxes in names:
        shape = as_matrix(values[0][boxes]).shape
        if len(shape) != 2 or shape[1] not in (4, 5) or boxes in flat:
            continue
        fitting = [name for name in flat if values[0][name].size == shape[0]]
        labels = [name for name in fitting if _are_labels([value[name] for value in values])]
        scores = [name for name in fitting if _are_scores([value[name] for value in values]) and name not in labels]
        if shape[1] == 4 and len(labels) == len(scores) == 1:
            return SelectedOutputs((labels[0], None), (scores[0], None), (boxes, 0))
        if shape[1] == 5 and len(labels) == 1 and len(fitting) == 1:
            return SelectedOutputs((labels[0], None), (boxes, 4), (boxes, 0))
    return None


def _is_flat(value: np.ndarray) -> bool:
    """[n] or [1, n] or [1, n, 1]."""
    return value.ndim == 1 or (value.ndim == 2 and value.shape[0] == 1) or (value.ndim == 3 and value.shape[2] == 1)


def _are_labels(columns: Sequence[np.ndarray]) -> bool:
    every = np.concatenate([column.reshape(-1) for column in columns])
    if np.issubdtype(every.dtype, np.integer):
        return True
    return bool(np.isfinite(every).all() and (every == np.round(every)).all() and every.min(initial=0) >= -1)


def _are_scores(columns: Sequence[np.ndarray]) -> bool:
    every = np.concatenate([column.reshape(-1) for column in columns])
    return np.issubdtype(every.dtype, np.floating) and bool(len(every)) and are_probabilities(every)


def _split_joined(graph: GraphIndex, name: str, values: Values) -> DenseOutputs | SelectedOutputs | None:
    """The single output as boxes and class scores, or as selected objects."""
    rows = [as_matrix(value[name]) for value in values]
    if rows[0].shape[1] == 6:
        found = _find_six_columns(name, rows)
        if found is not None:
            return found
    fits = [transposed for transposed in (False, True) if rows[0].shape[0 if transposed else 1] > 4]
    traced = _concat_layout(graph, name)
    found_blocks = []
    for transposed in fits:
        wide = np.concatenate([row.T if transposed else row for row in rows])
        count = wide.shape[1]
        for first in (0, count - 4):
            known = traced is not None and len(traced) == 1
            allowed = traced is None or (transposed, first) in traced
            if allowed and (known or _are_plausible_boxes(wide[:, first : first + 4])):
                others = (4, count) if first == 0 else (0, count - 4)
                found_blocks.append(
                    DenseOutputs(
                        "joined",
                        TensorSlice(name, transposed, others),
                        TensorSlice(name, transposed, (first, first + 4)),
                    )
                )
    if len(found_blocks) > 1:
        raise ExportError(
            f"output {name} {list(values[0][name].shape)} may hold boxes in {len(found_blocks)} places; "
            "expected [B, N, 4 + K] or [B, 4 + K, N]; export the model with two outputs, boxes and "
            "classes"
        )
    return found_blocks[0] if found_blocks else None


def _are_plausible_boxes(boxes: np.ndarray) -> bool:
    """Whether columns may be boxes: most centers or corners are well inside; class scores are mostly near 0."""
    inside = (boxes[:, 2:] >= -1e-4).mean() > 0.98 and np.median(boxes[:, :2], axis=0).min() > 0.03
    return bool(inside) and not bool(np.abs(boxes.sum(1) - 1).max() < 1e-3)  # a softmax sums to 1


def _find_six_columns(name: str, rows: Sequence[np.ndarray]) -> SelectedOutputs | None:
    """Boxes, score and class in six columns, in the order that their values show; None if there is none."""
    columns = np.concatenate(rows).T
    labels = [index for index in (5, 4, 0, 1) if _are_labels([columns[index]]) and columns[index].max() < 10_000]
    for label in labels:
        for score in (4, 5, 0, 1):
            rest = sorted({*range(6)} - {label, score})
            if score != label and rest[-1] - rest[0] == 3 and _are_scores([columns[score]]):
                corners = columns[rest]
                if (corners[2:] >= corners[:2] - 1e-4).mean() > 0.98 or (corners[2:] >= 0).mean() > 0.98:
                    return SelectedOutputs((name, label), (name, score), (name, rest[0]))
    return None


def _concat_layout(graph: GraphIndex, name: str) -> list[tuple[bool, int]] | None:
    """How the Concat before an output joins its inputs: (transposed, first column) of each input with 4 columns.

    transposed   it joins along the second to last axis: [4 + K, N]
    None if no Concat is found.
    """
    transposed = False
    while (node := graph.producers.get(name)) is not None:
        if node.op_type == "Concat":
            shapes = [graph.shape(one) or [] for one in node.input]
            rank = len(shapes[0])
            axis = next((item.i for item in node.attribute if item.name == "axis"), 0) % max(rank, 1)
            sizes = [shape[axis] for shape in shapes if len(shape) == rank]
            if rank < 2 or 4 not in sizes or None in sizes or axis < rank - 2:
                return None
            return [
                ((axis == rank - 2) != transposed, sum(one or 0 for one in sizes[:index]))
                for index, size in enumerate(sizes)
                if size == 4
            ]
        if node.op_type == "Transpose":
            perm = next((list(item.ints) for item in node.attribute if item.name == "perm"), [])
            transposed ^= perm[-2:] == [len(perm) - 1, len(perm) - 2]
        elif node.op_type not in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
            return None
        name = node.input[0]
    return None
