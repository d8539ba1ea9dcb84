"""Edits of a graph: sorting and pruning keep its results, and inner graphs count as readers."""

from __future__ import annotations

import numpy as np
from graphs import graph_of, run_model
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.graph_edit import prune, rename_tensors, replace_nodes, sort_nodes
from edgedetr.onnx_graph.graph_walk import all_nodes, captured, in_order


def with_if() -> ModelProto:
    """y = x + k where the first value of x is positive, else x * k; `k` is read inside the branches only."""
    result = [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    branches = [
        helper.make_graph([helper.make_node(op, ["x", "k"], ["r"], op)], op, [], result) for op in ("Add", "Mul")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["b"], "greater"),
        helper.make_node("Add", ["two", "zero"], ["k"], "k"),
        helper.make_node("If", ["b"], ["y"], "if", then_branch=branches[0], else_branch=branches[1]),
    ]
    return graph_of(nodes, {"two": 2, "zero": 0}, shape=(1, 3))


def test_nodes_are_sorted_behind_what_they_read_also_from_inner_graphs():
    model = with_if()
    image = np.float32([[1, 2, 3]])
    expected = run_model(model, x=image)[0]
    replace_nodes(model, list(model.graph.node)[::-1])
    sort_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names.index("k") < names.index("if") and names.index("greater") < names.index("if")
    np.testing.assert_array_equal(run_model(model, x=image)[0], expected)


def test_sorted_nodes_stay_in_their_order_and_a_cycle_comes_last():
    nodes = [
        helper.make_node("Relu", ["b"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "second"),
        helper.make_node("Relu", ["x"], ["c"], "third"),
        helper.make_node("Relu", ["x"], ["d"], "fourth"),
    ]
    assert [node.name for node in in_order(nodes)] == ["third", "fourth", "first", "second"]


def test_pruning_removes_dead_nodes_and_weights_and_keeps_what_a_branch_reads():
    model = with_if()
    image = np.float32([[-1, -2, -3]])
    expected = run_model(model, x=image)[0]
    model.graph.node.append(helper.make_node("Relu", ["big"], ["unread"], "dead"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(100, np.float32), "big"))
    model.graph.value_info.append(helper.make_tensor_value_info("unread", TensorProto.FLOAT, [100]))
    prune(model)
    assert [node.name for node in model.graph.node] == ["max", "greater", "k", "if"]
    assert {tensor.name for tensor in model.graph.initializer} == {"two", "zero"} and not model.graph.value_info
    np.testing.assert_array_equal(run_model(model, x=image)[0], expected)


def test_a_renamed_tensor_is_renamed_where_branches_read_it_and_not_where_they_make_it():
    node = with_if().graph.node[-1]
    rename_tensors(node, {"k": "other", "r": "outer"})
    assert captured(node) == {"x", "other", "r"}
    assert [inner.op_type for inner in all_nodes(with_if().graph)][:4] == ["ReduceMax", "Greater", "Add", "If"]
