"""Convert a graph to another opset; operators of opset 20 to 24 are written out in those of opset 19."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, defs, helper, version_converter

from edgedetr.errors import ExportError, first_line
from edgedetr.onnx_graph.graph_builder import GraphBuilder
from edgedetr.onnx_graph.graph_edit import replace_nodes
from edgedetr.onnx_graph.index import GraphIndex, float_attribute, int_attribute, opset_of, string_attribute

OPSET = 19  # of every graph that is written: see ExportConfig
IR_VERSION = 9  # the file format that came with opset 19
_MODES = {b"linear": b"bilinear", b"cubic": b"bicubic"}  # GridSample's modes were renamed at opset 20


def convert_opset(model: ModelProto, wanted: int) -> ModelProto:
    """The same function at another opset. Errors: ExportError that names the operator which does not exist there."""
    present = opset_of(model)
    if present == wanted:
        return model
    if present < wanted:
        try:
            return version_converter.convert_version(model, wanted)
        except Exception as error:  # a C++ library's RuntimeError, or protobuf's own kinds
            raise ExportError(
                f"opset {present} cannot be converted to {wanted} ({first_line(error)}); "
                f"export the model at opset {wanted}"
            ) from error
    result = ModelProto()
    result.CopyFrom(model)
    graph = GraphIndex(model)
    nodes: list[NodeProto] = []
    for number, node in enumerate(result.graph.node):
        written = _write_out(result, graph, node, number, present)
        for one in [node] if written is None else written:
            reason = _rewrite_node(one, wanted)
            if reason:
                raise ExportError(
                    f"{one.op_type} {one.name} of opset {present} {reason} opset {wanted}; "
                    f"export the model at opset {wanted}"
                )
        nodes += [node] if written is None else written
    replace_nodes(result, nodes)
    del result.opset_import[:], result.graph.value_info[:]
    result.opset_import.append(helper.make_opsetid("", wanted))
    result.ir_version = min(result.ir_version, IR_VERSION)
    return result


def _write_out(
    model: ModelProto, graph: GraphIndex, node: NodeProto, number: int, present: int
) -> list[NodeProto] | None:
    """Nodes of older operators for a newer one, or None where the node stays; their constants join the model."""
    write = _WRITE_OUT.get(node.op_type)
    if write is None or (
        node.op_type == "GroupNormalization" and present < 21
    ):  # its scale and bias are per group there
        return None
    builder = GraphBuilder(f"/{node.name.lstrip('/') or node.op_type}_{number}")
    write(_Rewrite(builder, graph, node))
    model.graph.initializer.extend(builder.constants)
    return builder.nodes


def _rewrite_node(node: NodeProto, wanted: int) -> str:
    """Rewrite a node of a newer opset in place; why that is impossible, or an empty string."""
    try:
        schema = defs.get_schema(node.op_type, wanted, "")
    except defs.SchemaError:
        return "does not exist at"
    for item in list(node.attribute):
        if node.op_type == "GridSample" and item.name == "mode":
            item.s = _MODES.get(item.s, item.s)
        if item.name not in schema.attributes:
            return f"has an attribute {item.name!r} that is unknown at"
    return "has more inputs than at" if len(node.input) > schema.max_input else ""


class _Rewrite:
    """A node to be written out: its inputs, attributes and types, and the builder of the nodes that replace it."""

    def __init__(self, builder: GraphBuilder, graph: GraphIndex, node: NodeProto) -> None:
        self.builder, self.graph, self.node = builder, graph, node
        self.add = builder.add
        fp16 = graph.types.get(node.input[0]) == TensorProto.FLOAT16
        self.dtype: type = np.float16 if fp16 else np.float32

    def input(self, index: int) -> str:
        """Name of an input, "" where it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def number(self, value: float | np.ndarray) -> str:
        """A constant of the node's own type."""
        return self.builder.constant(value, self.dtype)

    def real(self, name: str, default: float) -> float:
        return float_attribute(self.node, name, default)

    def shape(self, index: int) -> list[int | None]:
        """Sizes of an input; refused where not even the rank is known."""
        shape = self.graph.shape(self.input(index))
        if shape is None:
            self.refuse(f"has an input {self.input(index)!r} of unknown rank")
        return shape or []

    def size(self, index: int, axis: int) -> int:
        size = self.shape(index)[axis]
        if size is None:
            self.refuse(f"has an input {self.input(index)!r} of open size")
        return size or 0

    def refuse(self, why: str) -> None:
        raise ExportError(
            f"{self.node.op_type} {self.node.name} {why}, and cannot be written out for opset 19; "
            "export the model at opset 17 to 19"
        )

    def without(self, *, inputs: int, outputs: int = 1, attributes: tuple[str, ...] = ()) -> None:
        """Refuse a node with more inputs or outputs than these, or with one of these attributes set."""
        more = [name for name in [*self.node.input[inputs:], *self.node.output[outputs:]] if name]
        more += [item.name for item in self.node.attribute if item.name in attributes and (item.i or item.f)]
        if more:
            self.refuse(f"uses {more[0]!r}")


def _gelu(it: _Rewrite) -> None:
    x = it.input(0)
    if string_attribute(it.node, "approximate", "none") == "tanh":
        cube = it.add("Mul", it.add("Mul", it.add("Mul", x, x), x), it.number(0.044715))
        inner = it.add("Tanh", it.add("Mul", it.add("Add", x, cube), it.number(math.sqrt(2 / math.pi))))
    else:
        inner = it.add("Erf", it.add("Div", x, it.number(math.sqrt(2))))
    doubled = it.add("Mul", x, it.add("Add", inner, it.number(1)))
    it.add("Mul", doubled, it.number(0.5), output=it.node.output[0])


def _swish(it: _Rewrite) -> None:
    alpha = it.real("alpha", 1.0)
    inner = it.input(0) if alpha == 1 else it.add("Mul", it.input(0), it.number(alpha))
    it.add("Mul", it.input(0), it.add("Sigmoid", inner), output=it.node.output[0])


def _rms_norm(it: _Rewrite) -> None:
    rank = len(it.shape(0))
    axes = list(range(int_attribute(it.node, "axis", -1) % rank, rank))
    mean = it.add("ReduceMean", it.add("Mul", it.input(0), it.input(0)), it.builder.constant(axes), keepdims=1)
    root = it.add("Sqrt", it.add("Add", mean, it.number(it.real("epsilon", 1e-5))))
    it.add("Mul", it.add("Div", it.input(0), root), it.input(1), output=it.node.output[0])


def _group_norm(it: _Rewrite) -> None:
    """Of opset 21, with scale and bias per channel; each group is normalized as a row."""
    groups, rank = int_attribute(it.node, "num_groups", 1), len(it.shape(0))
    rows = it.add("Reshape", it.input(0), it.builder.constant([0, groups, -1]))
    ones, zeros = it.number(np.ones(groups)), it.number(np.zeros(groups))
    normalized = it.add("InstanceNormalization", rows, ones, zeros, epsilon=it.real("epsilon", 1e-5))
    whole = it.add("Reshape", normalized, it.add("Shape", it.input(0)))
    scale, bias = (it.add("Reshape", it.input(index), it.builder.constant([-1] + [1] * (rank - 2))) for index in (1, 2))
    it.add("Add", it.add("Mul", whole, scale), bias, output=it.node.output[0])


def _attention(it: _Rewrite) -> None:
    """softmax(Q K^T * scale + mask) V, of [B, heads, S, D] or of [B, S, heads * D]."""
    it.without(inputs=4, attributes=("is_causal", "softcap", "qk_matmul_output_mode"))
    joined = len(it.shape(0)) == 3
    heads = [int_attribute(it.node, name, 1) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    if not joined:
        heads = [it.size(index, 1) for index in range(3)]
    if heads[0] != heads[1]:
        it.refuse(f"has {heads[0]} heads of queries for {heads[1]} of keys")
    width = it.size(0, -1) // (heads[0] if joined else 1)
    q, k, v = (it.input(index) for index in range(3))
    if joined:
        q, k, v = (
            it.add("Transpose", it.add("Reshape", name, it.builder.constant([0, 0, count, -1])), perm=[0, 2, 1, 3])
            for name, count in zip((q, k, v), heads)
        )
    scale = it.real("scale", 0.0) or 1 / math.sqrt(width)
    scores = it.add("MatMul", it.add("Mul", q, it.number(scale)), it.add("Transpose", k, perm=[0, 1, 3, 2]))
    mask = it.input(3)
    if mask and it.graph.types.get(mask) == TensorProto.BOOL:
        mask = it.add("Where", mask, it.number(0.0), it.number(-np.inf))
    if mask:
        scores = it.add("Add", scores, mask)
    result = it.add("MatMul", it.add("Softmax", scores, axis=-1), v, output="" if joined else it.node.output[0])
    if joined:
        rotated = it.add("Transpose", result, perm=[0, 2, 1, 3])
        it.add("Reshape", rotated, it.builder.constant([0, 0, -1]), output=it.node.output[0])


def _rotary(it: _Rewrite) -> None:
    """Su et al. 2021: pairs of values rotated by an angle, of [B, heads, S, D] or of [B, S, heads * D]."""
    x, joined, node = it.input(0), len(it.shape(0)) == 3, it.node
    if joined:
        heads = int_attribute(node, "num_heads", 0)
        if not heads:
            it.refuse("has no num_heads")
        x = it.add("Transpose", it.add("Reshape", x, it.builder.constant([0, 0, heads, -1])), perm=[0, 2, 1, 3])
        width = it.size(0, 2) // heads
    else:
        width = it.size(0, 3)
    rotated = int_attribute(node, "rotary_embedding_dim", 0) or width
    cos, sin = it.input(1), it.input(2)
    if it.input(3):
        cos, sin = (it.add("Gather", name, it.input(3), axis=0) for name in (cos, sin))
    cos, sin = (it.add("Unsqueeze", name, it.builder.constant([1])) for name in (cos, sin))
    every = int_attribute(node, "interleaved", 0)
    half = rotated // 2
    first, second = (
        it.add("Slice", x, *(it.builder.constant([value]) for value in bounds))
        for bounds in (((0, rotated, 3, 2), (1, rotated, 3, 2)) if every else ((0, half, 3, 1), (half, rotated, 3, 1)))
    )
    parts = [
        it.add("Sub", it.add("Mul", cos, first), it.add("Mul", sin, second)),
        it.add("Add", it.add("Mul", sin, first), it.add("Mul", cos, second)),
    ]
    if every:
        parts = [it.add("Unsqueeze", name, it.builder.constant([4])) for name in parts]
        flat = it.add("Concat", *parts, axis=4)
        parts = [it.add("Reshape", flat, it.builder.constant([0, 0, 0, rotated]))]
    if rotated < width:
        parts.append(it.add("Slice", x, *(it.builder.constant([value]) for value in (rotated, width, 3, 1))))
    result = it.add("Concat", *parts, axis=3, output="" if joined else node.output[0])
    if joined:
        back = it.add("Transpose", result, perm=[0, 2, 1, 3])
        it.add("Reshape", back, it.builder.constant([0, 0, -1]), output=node.output[0])


_WRITE_OUT: dict[str, Callable[[_Rewrite], Any]] = {
    "Gelu": _gelu,
    "Swish": _swish,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
}
