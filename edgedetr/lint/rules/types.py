"""Element types: a strongly typed network casts nothing implicitly, so operands must have one type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from edgedetr.lint.lint_issue import LintIssue, node_issue
from edgedetr.lint.lint_targets import Target
from edgedetr.onnx_graph.index import FLOATS, GraphIndex, type_name

# Operator -> the inputs that must have one type; None = all of them.
EQUAL: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        (
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Mod",
            "Min",
            "Max",
            "Sum",
            "Mean",
            "PRelu",
            "Equal",
            "Greater",
            "GreaterOrEqual",
            "Less",
            "LessOrEqual",
            "Concat",
            "MatMul",
            "Gemm",
            "Conv",
            "ConvTranspose",
            "LayerNormalization",
            "InstanceNormalization",
            "GridSample",
        )
    ),
    "Where": (1, 2),
    "ScatterND": (0, 2),
    "ScatterElements": (0, 2),
    "Attention": (0, 1, 2),
}
# Mixed only from this release on.
MIXED_FROM: dict[str, tuple[int, int]] = {"Pow": (10, 8), "BatchNormalization": (10, 7)}


def equal_types(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.nodes:
        if node.op_type not in EQUAL and target.tensorrt >= MIXED_FROM.get(node.op_type, (0, 0)):
            continue
        positions = EQUAL.get(node.op_type) or range(len(node.input))
        names = [node.input[i] for i in positions if i < len(node.input)]
        kinds = [_computed_as(graph.types[name]) for name in names if name and name in graph.types]
        if len(set(kinds)) > 1:
            found = " and ".join(type_name(kind) for kind in dict.fromkeys(kinds))
            yield node_issue(
                node,
                f"{node.op_type} of {found}; a strongly typed network requires operands of one type",
                "cast one of them",
            )


def _computed_as(kind: int) -> int:
    return TensorProto.FLOAT if kind == TensorProto.DOUBLE else kind


def double(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    for node in graph.nodes:
        if any(graph.types.get(name) == TensorProto.DOUBLE for name in node.output) and node.op_type != "Constant":
            yield node_issue(
                node, "float64, which TensorRT computes as float32", "cast to float32 at export", "warning"
            )


def not_a_number(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    """NaN in a constant; and infinity in FP16, which a number above 65504 becomes."""
    for name, tensor in graph.constants.items():
        if tensor.data_type not in FLOATS - {TensorProto.BFLOAT16}:
            continue
        value = graph.value(name)
        if value is None:
            continue
        if np.isnan(value).any():
            yield LintIssue(name, "a constant holds NaN", "train again from the last good checkpoint, and export again")
        elif value.dtype == np.float16 and np.isposinf(value).any():
            yield LintIssue(
                name,
                "an FP16 constant is infinite: the number was above 65504",
                "keep it and its consumers float32",
                "warning",
            )


def uninferable(graph: GraphIndex, target: Target) -> Iterator[LintIssue]:
    if graph.inference_error:
        yield LintIssue(
            "the graph",
            f"its types and shapes cannot be inferred ({graph.inference_error}), so some rules could not check it",
            "check the file: python -m onnx.checker FILE",
        )
