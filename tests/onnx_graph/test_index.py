"""GraphIndex: hand-written graphs whose producers, consumers, types, shapes and values are known."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph_of
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.index import GraphIndex, constant_tensor, display_name, int_attribute, type_name


def small() -> ModelProto:
    """x [1, 4, 6, 6] -> Conv to 2 channels -> Relu -> Concat with itself -> y."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Concat", ["r", "r"], ["y"], "concat", axis=1),
    ]
    return graph_of(nodes, {"w": np.ones((2, 4, 1, 1))})


def test_producers_and_consumers_are_those_of_the_graph():
    graph = GraphIndex(small())
    assert {name: node.name for name, node in graph.producers.items()} == {"c": "conv", "r": "relu", "y": "concat"}
    assert [(item.node.name, item.index) for item in graph.consumers["r"]] == [("concat", 0), ("concat", 1)]
    assert graph.only_consumer("c") is graph.node_by_name["relu"]
    assert graph.only_consumer("r") is None  # read twice
    assert graph.only_consumer("y") is None  # leaves the graph
    assert graph.after_relu("c") == "r" and graph.after_relu("r") == "r"


def test_signs_follow_from_the_operators_before_a_tensor():
    graph = GraphIndex(small())
    assert graph.never_negative("r") and graph.never_negative("y")
    assert not graph.never_negative("c") and not graph.never_negative("x")


def test_types_and_shapes_are_inferred_and_the_files_own_claims_ignored():
    model = small()
    model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT16, [9, 9]))
    graph = GraphIndex(model)
    assert graph.types["r"] == TensorProto.FLOAT and graph.shape("r") == [1, 2, 6, 6]
    assert graph.shape("w") == [2, 4, 1, 1] and graph.shape("nothing") is None
    assert graph.inference_error == ""


def test_an_index_for_its_maps_alone_infers_nothing(monkeypatch):
    monkeypatch.setattr("edgedetr.onnx_graph.index.infer_types", lambda *_: pytest.fail("types were inferred"))
    assert GraphIndex(small()).producers["y"].name == "concat"


def test_sizes_and_constants_are_folded_and_the_image_is_not():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "last"], ["width"], "gather", axis=0),
        helper.make_node("Add", ["x", "two"], ["y"], "add"),
    ]
    model = graph_of(nodes, {"two": 2}, shape=(1, 4, 6, 5))
    model.graph.initializer.append(numpy_helper.from_array(np.array(3), "last"))
    graph = GraphIndex(model)
    assert graph.folded("width") == 5 and graph.folded("two") == 2
    assert graph.folded("y") is None and graph.value("s") is None


def test_a_damaged_constant_has_no_value():
    model = small()
    model.graph.initializer[0].raw_data = b"short"
    assert GraphIndex(model).value("w") is None


@pytest.mark.parametrize(
    "attribute, expected",
    [
        ({"value": numpy_helper.from_array(np.float32([1, 2]))}, np.float32([1, 2])),
        ({"value_int": 7}, np.int64(7)),
        ({"value_ints": [3, 4]}, np.int64([3, 4])),
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_floats": [0.5, 2.0]}, np.float32([0.5, 2.0])),
        ({"value_string": "text"}, None),
    ],
)
def test_a_constant_is_read_from_whichever_attribute_holds_it(attribute, expected):
    tensor = constant_tensor(helper.make_node("Constant", [], ["k"], **attribute))
    if expected is None:
        assert tensor is None
    else:
        value = numpy_helper.to_array(tensor)
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(value, expected)


def test_names_and_attributes_in_messages():
    node = helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=1)
    assert display_name(node) == "TopK -> values"
    assert int_attribute(node, "axis", -1) == 1 and int_attribute(node, "largest", 1) == 1
    assert [type_name(kind) for kind in (1, 7, 10, 11, 999)] == ["float32", "int64", "float16", "float64", "type 999"]
