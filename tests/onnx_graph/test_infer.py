"""Types and shapes are inferred from inputs, weights and operators, also of damaged files."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph_of
from onnx import TensorProto, helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.infer import checked, infer_types


def test_an_open_batch_takes_the_size_that_is_asked_for():
    model = graph_of([helper.make_node("Flatten", ["x"], ["y"], "flatten")], {}, shape=("batch", 4, 5))
    assert infer_types(model).shapes["x"] == [None, 4, 5]
    found = infer_types(model, open_size=7)
    assert (found.shapes["y"], found.types["y"], found.error) == ([7, 20], TensorProto.FLOAT, "")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"  # the model is not changed


def test_large_weights_take_part_by_type_and_shape():
    model = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], {"w": np.zeros((200, 300))}, shape=(2, 200))
    found = infer_types(model)
    assert found.shapes["y"] == [2, 300] and found.types["w"] == TensorProto.FLOAT


def test_a_misfit_is_reported_and_the_rest_inferred():
    nodes = [helper.make_node("Relu", ["x"], ["a"], "relu"), helper.make_node("MatMul", ["a", "w"], ["y"], "m")]
    found = infer_types(graph_of(nodes, {"w": np.zeros((9, 2))}, shape=(2, 4)))
    assert found.error and not found.failed
    assert found.shapes["a"] == [2, 4] and found.types["y"] == TensorProto.FLOAT


def joined(rows: int):
    nodes = [helper.make_node("Relu", ["x"], ["a"], "relu"), helper.make_node("MatMul", ["a", "w"], ["y"], "m")]
    model = graph_of(nodes, {"w": np.zeros((rows, 2))}, shape=(2, 4))
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 2]))
    return model


def test_a_checked_graph_knows_its_inner_tensors_and_a_wrong_one_is_refused():
    found = {item.name: item.type.tensor_type for item in checked(joined(4)).graph.value_info}
    assert [size.dim_value for size in found["a"].shape.dim] == [2, 4]
    with pytest.raises(ExportError, match="not valid ONNX"):
        checked(joined(9))
