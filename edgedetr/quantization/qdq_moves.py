"""Edit where Q and DQ stand: across a node that they commute with, behind a padding; and one scale for a Concat.

Q and DQ with one scale for the whole tensor change each element by itself and never swap two of them. So they commute
with nodes that join or move elements or take the largest: `moved_before` and `moved_behind` change no bit of a result.
`quantized_padding` changes none either.
`shared_scale` rounds anew: an element with scale s moves by at most s / 2 + S / 2, where S is the largest scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_edit import prune, replace_nodes
from edgedetr.onnx_graph.index import GraphIndex, display_name, int_attribute, ints_attribute

PAIR = ("QuantizeLinear", "DequantizeLinear")
COMMUTING = ("Concat", "Transpose", "Reshape", "Slice", "MaxPool")


@dataclass(frozen=True)
class Grid:
    """The levels of a whole tensor: (integer - zero_point) * scale. `types` are those of scale and zero point."""

    scale: float
    zero_point: int
    types: tuple[str, str]


def moved_before(model: ModelProto, tensor: str) -> ModelProto:
    """A copy in which the Q or DQ that makes `tensor` stands in front of the node that it reads, at each data input.

    Errors: ExportError where the two do not commute, or the scale is not one constant.
    """
    graph = GraphIndex(model)
    moving = graph.producers[tensor]
    grid_of(moving, graph)
    node = graph.producers.get(moving.input[0])
    if node is None:
        raise ExportError(f"{display_name(moving)} reads no node; expected one of {', '.join(COMMUTING)}")
    made = []
    passing = _renamed(node, f"{tensor}/{node.op_type}", tensor)
    for index in _data_inputs(node):
        name = f"{tensor}/{index}"
        one = _renamed(moving, name, name)
        one.input[0] = node.input[index]
        passing.input[index] = name
        made.append(one)
    return _replaced(model, moving, [*made, passing])


def moved_behind(model: ModelProto, tensor: str) -> ModelProto:
    """A copy in which what every data input of the node that makes `tensor` reads, Q or DQ, stands behind that node.

    Errors: ExportError where they do not commute, or do not all have one scale and zero point.
    """
    graph = GraphIndex(model)
    node = graph.producers[tensor]
    moving = [graph.producers.get(node.input[index]) for index in _data_inputs(node)]
    kinds = {"" if one is None else one.op_type for one in moving}
    pairs = [one for one in moving if one is not None and one.op_type in PAIR]
    if len(kinds) > 1 or len(pairs) < len(moving):
        raise ExportError(f"{display_name(node)}: its inputs are not all quantized, or not all dequantized")
    if len({grid_of(one, graph) for one in pairs}) > 1:
        raise ExportError(f"{display_name(node)}: its inputs have several scales or zero points")
    inner = f"{tensor}/{node.op_type}"
    passing, behind = _renamed(node, inner, inner), _renamed(pairs[0], f"{tensor}/{pairs[0].op_type}", tensor)
    for index, one in zip(_data_inputs(node), pairs):
        passing.input[index] = one.input[0]
    behind.input[0] = inner
    return _replaced(model, node, [passing, behind])


def shared_scale(model: ModelProto, tensor: str) -> ModelProto:
    """A copy in which the inputs of the Concat that makes `tensor` have the largest of their scales.

    An input that other nodes read too keeps its own scale for them.

    Errors: ExportError where an input has no Q/DQ pair of its own, or the zero points differ.
    """
    graph = GraphIndex(model)
    node = graph.producers[tensor]
    restores = [_dequantizer(name, node, graph) for name in node.input]
    grids = [grid_of(one, graph) for one in restores]
    if node.op_type != "Concat" or len({(grid.zero_point, grid.types) for grid in grids}) > 1:
        raise ExportError(f"{display_name(node)}: expected a Concat whose inputs have one zero point")
    largest = max(range(len(grids)), key=lambda index: grids[index].scale)
    parameters = restores[largest].input[1:]
    made, joined = [], _renamed(node, node.name, tensor)
    for index, (one, grid) in enumerate(zip(restores, grids)):
        if grid == grids[largest]:
            continue
        quantized, restored = f"{tensor}/{index}/quantized", f"{tensor}/{index}/dequantized"
        read = graph.producers[one.input[0]].input[0]
        made += [
            helper.make_node("QuantizeLinear", [read, *parameters], [quantized], quantized),
            helper.make_node("DequantizeLinear", [quantized, *parameters], [restored], restored),
        ]
        joined.input[index] = restored
    return _replaced(model, node, [*made, joined])


def quantized_padding(model: ModelProto, tensor: str) -> ModelProto:
    """A copy in which the AveragePool that makes `tensor` gets its padding as integers: Pad, Q, DQ stand before it.

    They have the scale and zero point of the DQ that the padding reads. Zero is one of its levels: no bit changes.

    Errors: ExportError where no zeros are added behind a DQ, or how many is not written in the graph.
    """
    graph = GraphIndex(model)
    pool = graph.producers[tensor]
    before = graph.producers.get(pool.input[0])
    pad = before if before is not None and before.op_type == "Pad" else None
    restore = before if pad is None else graph.producers.get(pad.input[0])
    if pool.op_type != "AveragePool" or restore is None or restore.op_type != PAIR[1]:
        raise ExportError(f"{display_name(pool)}: expected an AveragePool behind a DQ, or a Pad between the two")
    grid_of(restore, graph)
    made, initializers = [], []
    padded = pool.input[0]
    if pad is None:
        sides = ints_attribute(pool, "pads")
        if not sides or int_attribute(pool, "ceil_mode", 0):
            raise ExportError(f"{display_name(pool)}: expected the attribute pads, and whole windows")
        half = len(sides) // 2
        counts, padded = f"{tensor}/pads", f"{tensor}/Pad"
        initializers = [numpy_helper.from_array(np.array([0, 0, *sides[:half], 0, 0, *sides[half:]]), counts)]
        made = [helper.make_node("Pad", [pool.input[0], counts], [padded], padded)]
    quantized, restored = f"{tensor}/quantized", f"{tensor}/dequantized"
    parameters = restore.input[1:]
    averaging = _renamed(pool, pool.name, tensor)
    averaging.input[0] = restored
    kept = [attribute for attribute in pool.attribute if attribute.name not in ("pads", "count_include_pad")]
    del averaging.attribute[:]
    averaging.attribute.extend(kept)
    made += [
        helper.make_node("QuantizeLinear", [padded, *parameters], [quantized], quantized),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [restored], restored),
        averaging,
    ]
    return _replaced(model, pool, made, initializers)


def grid_of(node: NodeProto, graph: GraphIndex) -> Grid:
    """The levels of a Q or DQ. Errors: ExportError where they are not one constant scale and zero point."""
    values = [graph.value(name) for name in node.input[1:3]]
    if node.op_type not in PAIR or len(values) < 2 or any(value is None or value.size != 1 for value in values):
        raise ExportError(f"{display_name(node)}: expected a Q or DQ with one constant scale and one zero point")
    scale, zero = (np.asarray(value).reshape(-1) for value in values)
    return Grid(float(scale[0]), int(zero[0]), (scale.dtype.name, zero.dtype.name))


def _dequantizer(tensor: str, reader: NodeProto, graph: GraphIndex) -> NodeProto:
    """The DQ of the pair that makes a tensor."""
    node = graph.producers.get(tensor)
    before = graph.producers.get(node.input[0]) if node is not None and node.op_type == PAIR[1] else None
    if node is None or before is None or before.op_type != PAIR[0]:
        raise ExportError(f"{display_name(reader)}: its input {tensor!r} has no Q/DQ pair of its own")
    return node


def _data_inputs(node: NodeProto) -> range:
    """Inputs that hold elements, not sizes. Errors: ExportError for a node that Q and DQ do not commute with."""
    if node.op_type not in COMMUTING or len(node.output) > 1:
        raise ExportError(f"Q and DQ cannot move across {display_name(node)}; expected one of {', '.join(COMMUTING)}")
    return range(len(node.input) if node.op_type == "Concat" else 1)


def _renamed(node: NodeProto, name: str, output: str) -> NodeProto:
    """A copy with another name and output."""
    copy = NodeProto.FromString(node.SerializeToString())
    copy.name = name
    copy.output[:] = [output]
    return copy


def _replaced(
    model: ModelProto, old: NodeProto, new: Sequence[NodeProto], initializers: Sequence[TensorProto] = ()
) -> ModelProto:
    """A copy with these nodes in place of one, without what no output depends on any more."""
    result = ModelProto()
    result.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(new if node is old or node.output == old.output else [node])
    replace_nodes(result, nodes)
    result.graph.initializer.extend(initializers)
    prune(result)
    return result
