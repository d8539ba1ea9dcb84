"""Roles in node metadata: written, read, and derived from names in files of 0.1 and 0.2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import get_role, load_policy, make_plan, node_roles, role_from_name, set_role
from edgedetr.runtime.backends.base import MADE_BY

BUNDLE = Path(__file__).parents[1] / "fixtures" / "bundle-0.1"


def model_of(*names: str) -> onnx.ModelProto:
    tensors = [f"t{i}" for i in range(len(names) + 1)]
    nodes = [helper.make_node("Relu", [a], [b], name) for name, a, b in zip(names, tensors, tensors[1:])]
    value = helper.make_tensor_value_info
    inputs, outputs = value(tensors[0], TensorProto.FLOAT, [2]), value(tensors[-1], TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", [inputs], [outputs])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_a_role_is_replaced_and_removed_and_other_metadata_stays():
    node = model_of("a").graph.node[0]
    node.metadata_props.add(key="other", value="kept")
    assert get_role(node) == ""
    for role in ("decoder", "query_selection", ""):
        set_role(node, role)
        assert get_role(node) == role
    assert [(item.key, item.value) for item in node.metadata_props] == [("other", "kept")]


@pytest.mark.parametrize(
    "name, role",
    [
        ("/detector/decoder/layers.0/self_attention/q/MatMul", "decoder"),
        ("/detector/decoder/layers.0/cross_attention/value/MatMul", "memory_projection"),
        ("/detector/decoder/layers.0/cross_attention/k_x/MatMul", "decoder"),
        ("/detector/selector/project/project.0/MatMul", "memory_projection"),
        ("/detector/selector/score/MatMul", "query_selection"),
        ("/detector/encoder/layers.0/attention/weights/MatMul", "attention_weights"),
        ("/detector/encoder/layers.0/offset_1/Conv", "sampling_offsets"),
        ("/detector/backbone/stem/stem.0/Conv", ""),
    ],
)
def test_names_of_0_2_have_the_roles_that_its_policy_gave_them(name, role):
    assert role_from_name(name) == role


def test_names_decide_only_in_a_graph_without_any_role():
    model = model_of("/decoder/a", "/decoder/b")
    assert node_roles(model) == {"/decoder/a": "decoder", "/decoder/b": "decoder"}
    set_role(model.graph.node[0], "memory_projection")
    assert node_roles(model) == {"/decoder/a": "memory_projection"}


def test_a_graph_with_roles_is_valid_and_runs():
    model = model_of("a")
    set_role(model.graph.node[0], "decoder")
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"t0": np.array([-1, 2], np.float32)})[0], [0, 2])


def test_the_bundle_that_0_1_wrote_gets_the_same_int8_layers_as_then_but_for_narrow_ones():
    model = split_concats(onnx.load(BUNDLE / "model.onnx"))
    assert not any(node.metadata_props for node in model.graph.node)
    then = {
        item.name.removesuffix(".weight_quantized")
        for item in onnx.load(BUNDLE / "model.int8.onnx").graph.initializer
        if item.name.endswith(".weight_quantized")
    }
    now = {layer.node for layer in make_plan(GraphIndex(model), load_policy("default")).layers}
    sizes = {item.name: item.dims for item in model.graph.initializer}
    narrow = {  # this bundle's network is so small that it has convolutions with 4 channels
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and (sizes[node.input[1]][0] < 8 or sizes[node.input[1]][1] in (1, 2, 4, 5, 6, 7))
    }
    assert now == then - narrow and len(now) > 10 and narrow & then


@pytest.mark.parametrize("name, target", [("model.int8.onnx", "tensorrt"), ("model.int8-cpu.onnx", "cpu")])
def test_what_a_graph_of_0_1_was_made_with_is_still_read(name, target):
    metadata = {item.key: item.value for item in onnx.load(BUNDLE / name).metadata_props}
    made_by = json.loads(metadata[MADE_BY])
    assert (made_by["dialect"], made_by["weight_bits"], made_by["policy"]) == (target, 8, "default")
