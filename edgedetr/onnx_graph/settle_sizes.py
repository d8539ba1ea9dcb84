"""Sizes inside a graph that takes one size, read off a run, where shape inference cannot follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.control_flow import captured, first_line
from edgedetr.onnx_graph.fold import fold, part_of
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.runtime.backends.onnxruntime import plain_session

# How large their results are depends on values, not on sizes.
_BY_VALUE = {
    "NonZero",
    "Unique",
    "Compress",
    "NonMaxSuppression",
    "If",
    "Loop",
    "Scan",
    "SequenceMap",
    "SplitToSequence",
    "SequenceAt",
    "ConcatFromSequence",
    "RandomUniform",
    "RandomNormal",
    "Bernoulli",
    "StringSplit",
}
_SIDE = 1000  # what inputs that are no image hold: a size in pixels


def settle(model: ModelProto) -> ModelProto:
    """The same function, folded; sizes that are left to compute are replaced by those of a run."""
    result = fold(model)
    left = [node for node in result.graph.node if node.op_type in ("Shape", "Size")]
    seen = shapes_by_running(result, [node.input[0] for node in left])
    found = False
    for node in left:
        shape = seen.get(node.input[0])
        if shape is not None:
            value = shape[part_of(node, len(shape))] if node.op_type == "Shape" else int(np.prod(shape))
            result.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), node.output[0]))
            result.graph.node.remove(node)
            found = True
    return fold(result) if found else result


def shapes_by_running(model: ModelProto, names: Sequence[str]) -> dict[str, list[int]]:
    """Sizes of tensors of a graph of fixed inputs, in ONNX Runtime; those that depend on values are left out."""
    graph = GraphIndex(model)
    depending = _depending(graph)
    wanted = [name for name in dict.fromkeys(names) if name and name not in depending]
    if not wanted:
        return {}
    probe = ModelProto()
    probe.CopyFrom(model)
    given = {item.name for item in model.graph.output}
    probe.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in wanted if name not in given and name in graph.producers
    )
    feed = {item.name: _some(item) for item in model.graph.input if item.name not in graph.constants}
    made = [name for name in wanted if name in graph.producers]
    runner = plain_session(probe.SerializeToString(), threads=1, error=ExportError, fix="export the model again")
    try:
        values = dict(zip(made, runner.run(made, feed)))
    except Exception as error:  # the library's exceptions share no public base class
        raise ExportError(
            f"the graph does not run at this size in ONNX Runtime ({first_line(error)}); say another "
            "with --input HxW, or export the model again"
        ) from error
    values |= {name: feed[name] for name in wanted if name in feed}
    return {name: list(value.shape) for name, value in values.items() if isinstance(value, np.ndarray)}


def _depending(graph: GraphIndex) -> set[str]:
    """Tensors whose size may depend on the values of the image."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type in _BY_VALUE or any(name in found for name in [*node.input, *captured(node)]):
            found.update(node.output)
    return found


def _some(item: Any) -> np.ndarray:
    kind = item.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = [dim.dim_value or 1 for dim in kind.shape.dim]
    if len(shape) == 4:
        return np.random.default_rng(0).uniform(0, 1, shape).astype(dtype)
    return np.full(shape, _SIDE, dtype)
