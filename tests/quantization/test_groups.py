"""Groups of small graphs; those of every member are in tests/models/test_members_deployed.py."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.groups import floor_of, groups_of
from edgedetr.quantization.policy import Policy, set_role


def model_of(nodes, shape, **constants):
    initializers = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(nodes[-1].output[0])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def test_multiply_accumulates_are_those_of_the_loops():
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Reshape", ["c", "rows"], ["r"], "reshape"),
        helper.make_node("MatMul", ["r", "w"], ["m"], "linear"),
        helper.make_node("Transpose", ["m"], ["t"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["m", "t"], ["p"], "product"),
        helper.make_node("Gemm", ["flat", "g"], ["y"], "gemm", transB=1),
    ]
    nodes.insert(5, helper.make_node("Reshape", ["p", "two"], ["flat"], "flatten"))
    model = model_of(nodes, [1, 16, 8, 8], k=np.ones((32, 16, 3, 3)), w=np.ones((32, 24)), g=np.ones((20, 16)))
    for name, value in (("rows", [1, 16, 32]), ("two", [16, 16])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    found = {group.id: group for group in groups_of(GraphIndex(model), Policy("all"))}
    assert {name: (group.kind, group.macs) for name, group in found.items()} == {
        "conv": ("convolution", 4 * 4 * 32 * 16 * 9),
        "linear": ("linear", 16 * 24 * 32),
        "product": ("product", 16 * 16 * 24),
        "gemm": ("linear", 16 * 20 * 16),
    }
    assert {name for name, group in found.items() if group.default} == {"conv", "linear", "gemm"}


def test_boxes_from_distributions_and_rows_of_samples_are_in_the_floor():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "sides"),
        helper.make_node("MatMul", ["h", "v"], ["i"], "values"),
        helper.make_node("Unsqueeze", ["i", "axis"], ["s"], "row"),
        helper.make_node("MatMul", ["s", "i2"], ["y"], "samples"),
    ]
    nodes.insert(3, helper.make_node("Reshape", ["i", "shape"], ["i2"], "reshape"))
    set_role(nodes[0], "box_distribution")
    model = model_of(nodes, [32, 16], w=np.ones((16, 16)), v=np.ones((16, 16)))
    for name, value in (("axis", [1]), ("shape", [32, 16, 1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    graph = GraphIndex(model)
    assert [group.id for group in groups_of(graph, Policy("all"))] == ["values"]
    assert {name: reason.split(":")[0] for name, reason in floor_of(graph).items()} == {
        "sides": "distributions of a box's sides",
        "samples": "weighs samples, one row per matrix",
    }
