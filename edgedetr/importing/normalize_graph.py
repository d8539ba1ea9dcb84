"""A file made elsewhere becomes one graph in plain operators: one image of one size, float32, opset 19, folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.inliner import inline_local_functions

from edgedetr.errors import ExportError, UsageError, first_line
from edgedetr.importing import io_contract, surgery
from edgedetr.importing.onnx_sidecars import PROCESSOR, Beside
from edgedetr.onnx_graph.fold import fold_at_fixed_size
from edgedetr.onnx_graph.fp32 import convert_to_fp32
from edgedetr.onnx_graph.graph_edit import sort_nodes
from edgedetr.onnx_graph.index import GraphIndex, display_name
from edgedetr.onnx_graph.io import open_onnx, tensors
from edgedetr.onnx_graph.opset import OPSET, to_opset

LARGEST_SIDE = 8192  # pixels; images and tensors of a larger input would not fit into memory
# What no TensorRT takes: control flow that the size does not decide, lists, text, and results of open length.
_REFUSED = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "control flow that the input's size does not decide"),
    **dict.fromkeys(
        (
            "SequenceConstruct",
            "SequenceAt",
            "SequenceInsert",
            "SequenceErase",
            "SequenceEmpty",
            "SequenceLength",
            "SplitToSequence",
            "ConcatFromSequence",
            "Optional",
            "OptionalGetElement",
            "OptionalHasElement",
        ),
        "lists of tensors",
    ),
    **dict.fromkeys(
        ("StringNormalizer", "StringSplit", "StringConcat", "RegexFullMatch", "TfIdfVectorizer", "LabelEncoder"), "text"
    ),
}


def read_model(path: Path) -> ModelProto:
    """The file's graph in operators of ONNX alone, checked. Weights in plain files beside it are read."""
    opened = open_onnx(path)
    if opened.faults:
        raise ExportError(
            f"{path}: {opened.faults[0]}; expected weights in the file, or in a plain file beside it; "
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
        for kind in open_outputs:  # the checker wants a shape, which says nothing here
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
    """ExportError where a tensor's values are not those of its type and size; the checker does not look."""
    for tensor in tensors(model):
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:  # ValueError, TypeError, KeyError, and protobuf's own
            raise ExportError(
                f"{path}: tensor {tensor.name!r} is damaged ({first_line(error)}); export the model again"
            ) from error


def size_of(model: ModelProto, image: str, asked: tuple[int, int] | None, beside: Beside) -> tuple[int, int]:
    """Height and width: the file's own, else as asked, else as the processor beside the file says."""
    fixed = io_contract.size_of(model, image)
    if asked is not None and any(one not in (None, two) for one, two in zip(fixed, asked)):
        raise UsageError(
            f"--input is {asked[0]}x{asked[1]}; the file takes {fixed[0] or '?'}x{fixed[1] or '?'} alone; "
            "leave --input out, or export the model with an open size"
        )
    told = beside.size if beside.size and all(one in (None, two) for one, two in zip(fixed, beside.size)) else None
    height, width = asked or told or fixed
    if height is None or width is None:
        raise UsageError(
            f"the file leaves height and width open, and no {PROCESSOR} beside it says them; say which to "
            "use: --input 640x640 (height x width)"
        )
    if max(height, width) > LARGEST_SIDE:
        raise ExportError(
            f"the input is {height} x {width}; expected at most {LARGEST_SIDE} pixels a side; export the "
            "model for a smaller one"
        )
    return height, width


def fixed(
    original: ModelProto, taken: io_contract.Inputs, height: int, width: int
) -> tuple[ModelProto, GraphIndex, bool]:
    """The graph for one image of one size, an index of it, and whether the file computes in halves of float32."""
    model = ModelProto()
    model.CopyFrom(original)
    sizes = {taken.image: [1, 3, height, width], **({taken.sizes: [1, 2]} if taken.sizes else {})}
    masks = {taken.mask: np.ones((1, height, width), dtype_of(original, taken.mask))} if taken.mask else {}
    surgery.fix_inputs(model, sizes, masks)
    half = convert_to_fp32(model)
    model = fold_at_fixed_size(to_opset(model, OPSET))
    surgery.name_nodes(model)
    for node in model.graph.node:
        if node.op_type in _REFUSED:
            raise ExportError(
                f"{display_name(node)} is {node.op_type}: {_REFUSED[node.op_type]}, which TensorRT does not "
                "run; export the model with a fixed size and without its post-processing"
            )
    graph = GraphIndex(model)
    if graph.inference_error:
        raise ExportError(
            f"sizes cannot be inferred for a {height} x {width} image ({graph.inference_error}); expected a model "
            "that takes this size; say another with --input HxW"
        )
    text = next((name for name, kind in graph.types.items() if kind == TensorProto.STRING), None)
    if text is not None:
        raise ExportError(
            f"tensor {text!r} holds text, which TensorRT does not run; export the model without its post-processing"
        )
    return model, graph, half


def dtype_of(model: ModelProto, name: str) -> np.dtype:
    """Of an input."""
    kind = next(item.type.tensor_type.elem_type for item in model.graph.input if item.name == name)
    return onnx.helper.tensor_dtype_to_np_dtype(kind)
