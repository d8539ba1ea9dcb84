"""Constant folding keeps results, and leaves no size to compute where the input is fixed."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph_of, run_model
from onnx import TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.fold import fold


@pytest.mark.parametrize("part", [{}, {"start": 1}, {"start": -2}, {"end": -1}, {"start": 1, "end": 3}, {"start": 9}])
def test_a_part_of_a_shape_is_folded(part):
    model = graph_of(
        [
            helper.make_node("Shape", ["x"], ["s"], "shape", **part),
            helper.make_node("Cast", ["s"], ["f"], "cast", to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["f"], ["t"], "sum", keepdims=0),
            helper.make_node("Add", ["x", "t"], ["y"], "add"),
        ],
        {},
        shape=(1, 4, 6, 5),
        opset=19,
    )
    image = np.zeros((1, 4, 6, 5), np.float32)
    folded = fold(model)
    assert [node.op_type for node in folded.graph.node] == ["Add"]
    np.testing.assert_array_equal(run_model(folded, x=image)[0], run_model(model, x=image)[0])
    assert run_model(model, x=image)[0].flat[0] == sum((1, 4, 6, 5)[part.get("start") : part.get("end")])


@pytest.mark.parametrize("shape, is_doubled", [((1, 1, 3), False), ((1, 2, 3), True)])
def test_a_branch_that_the_size_decides_is_taken(shape, is_doubled):
    """TorchScript writes squeeze of an open size as If; it reads tensors from outside, and its names are used twice."""
    x = helper.make_tensor_value_info
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["x", "k"], ["inner"]), helper.make_node("Identity", ["inner"], ["r"])],
            name,
            [],
            [x("r", TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Add"), ("else", "Mul"))
    ]
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape", start=1, end=2),
        helper.make_node("Equal", ["s", "one"], ["c"], "equal"),
        helper.make_node("Squeeze", ["c"], ["b"], "squeeze"),
        helper.make_node("Add", ["two", "half"], ["k"], "constant"),
        helper.make_node("If", ["b"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    model = graph_of(nodes, {"two": 2, "half": 0.5}, shape=shape, opset=19)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    image = np.ones(shape, np.float32)
    folded = fold(model)
    assert folded.graph.node[0].op_type == ("Mul" if is_doubled else "Add")
    assert "If" not in {node.op_type for node in folded.graph.node}
    np.testing.assert_array_equal(run_model(folded, x=image)[0], np.full(shape, 2.5 if is_doubled else 3.5))


def test_a_branch_that_the_image_decides_keeps_what_it_reads():
    x = helper.make_tensor_value_info
    results = [x("r", TensorProto.FLOAT, None)]
    branches = [
        helper.make_graph([helper.make_node(op, ["alias", "k"], ["r"])], name, [], results)
        for name, op in (("then", "Add"), ("else", "Mul"))
    ]
    nodes = [
        helper.make_node("Identity", ["x"], ["alias"], "alias"),
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Greater", ["m", "half"], ["b"], "greater"),
        helper.make_node("Add", ["two", "half"], ["k"], "constant"),
        helper.make_node("If", ["b"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    model = graph_of(nodes, {"two": 2, "half": 0.5}, opset=19)
    folded = fold(model)
    for value in (0.0, 1.0):
        image = np.full((1, 4, 6, 6), value, np.float32)
        np.testing.assert_array_equal(run_model(folded, x=image)[0], run_model(model, x=image)[0])
