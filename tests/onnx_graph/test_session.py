"""GraphSession gives any tensor of a graph, and refuses what ONNX Runtime cannot run with what to do about it."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph_of
from onnx import helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.session import GraphSession, shapes_by_running, with_outputs


def model():
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["twice"], "mul"),
        helper.make_node("NonZero", ["x"], ["where"], "nonzero"),
        helper.make_node("Relu", ["twice"], ["y"], "relu"),
    ]
    return graph_of(nodes, {"two": 2}, shape=(1, 3))


@pytest.mark.parametrize("optimize", [False, "basic", True])
def test_inner_tensors_and_outputs_have_their_values(optimize):
    x = np.float32([[-1, 0, 3]])
    found = GraphSession(model(), ["y", "twice"], optimize=optimize).run({"x": x})
    assert list(found) == ["y", "twice"]
    np.testing.assert_array_equal(found["twice"], 2 * x)
    np.testing.assert_array_equal(found["y"], np.maximum(2 * x, 0))


def test_without_names_the_graphs_own_outputs_are_given_and_the_graph_is_not_changed():
    graph = model()
    before = graph.SerializeToString()
    assert list(GraphSession(graph).run({"x": np.zeros((1, 3), np.float32)})) == ["y"]
    assert [item.name for item in with_outputs(graph, ["twice"]).graph.output] == ["twice"]
    assert graph.SerializeToString() == before and with_outputs(graph, ["y"]) is graph


def test_inputs_that_do_not_fit_are_an_error_with_what_to_do():
    with pytest.raises(ExportError, match="the graph does not run in ONNX Runtime .*; export it at another size"):
        GraphSession(model(), fix="export it at another size").run({"x": np.zeros((1, 7), np.float32)})
    with pytest.raises(ExportError, match="(?s)cannot load it .*; export the model again"):
        GraphSession(model(), ["no such tensor"])


def test_sizes_come_from_a_run_except_those_that_depend_on_values():
    assert shapes_by_running(model(), ["x", "twice", "where", ""]) == {"x": [1, 3], "twice": [1, 3]}
