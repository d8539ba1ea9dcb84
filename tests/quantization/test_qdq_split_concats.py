"""Splitting convolutions behind a Concat changes no value."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgedetr.quantization.concat_split import split_concats


def network(rng, kernel=1, mode="nearest", branches=2, strides=1):
    """A strided Conv, enlarged, and Convs of the full size -> Concat -> two Convs that read it."""
    constants = {"ws": rng.normal(size=(8, 3, 2, 2)), "scales": np.array([1, 1, 2, 2])}
    nodes = [
        helper.make_node("Conv", ["images", "ws"], ["small"], "small", strides=[2, 2]),
        helper.make_node("Relu", ["small"], ["relu"], "relu"),
        helper.make_node(
            "Resize",
            ["relu", "", "scales"],
            ["large"],
            "resize",
            mode=mode,
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
    ]
    names = ["large"]
    for i in range(branches - 1):
        constants[f"wf{i}"] = rng.normal(size=(4 + i, 3, 1, 1))
        nodes.append(helper.make_node("Conv", ["images", f"wf{i}"], [f"fine{i}"], f"fine{i}"))
        names.append(f"fine{i}")
    width = 8 + sum(4 + i for i in range(branches - 1))
    nodes.append(helper.make_node("Concat", names, ["both"], "cat", axis=1))
    for output in ("logits", "boxes"):
        constants[f"w_{output}"] = rng.normal(size=(16, width, kernel, kernel))
        constants[f"b_{output}"] = rng.normal(size=16)
        nodes.append(
            helper.make_node(
                "Conv",
                ["both", f"w_{output}", f"b_{output}"],
                [output],
                f"conv_{output}",
                pads=[kernel // 2] * 4,
                strides=[strides] * 2,
            )
        )
    initializers = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 8 // strides, 8 // strides])
        for name in ("logits", "boxes")
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])], outputs, initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def run(model, images):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits", "boxes"], {"images": images})


@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_the_split_graph_computes_the_same_and_has_no_concat(rng, branches, mode):
    model = network(rng, branches=branches, mode=mode)
    split = split_concats(model)
    assert not [node for node in split.graph.node if node.op_type == "Concat"]
    images = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    for expected, actual in zip(run(model, images), run(split, images)):
        np.testing.assert_allclose(actual, expected, atol=2e-5)  # float32, another order of about 20 summands


def test_a_nearest_branch_is_convolved_before_it_is_enlarged(rng):
    split = split_concats(network(rng))
    producers = {name: node for node in split.graph.node for name in node.output}
    resizes = [node for node in split.graph.node if node.op_type == "Resize"]
    assert len(resizes) == 2
    assert all(producers[node.input[0]].op_type == "Conv" for node in resizes)


@pytest.mark.parametrize("options", [{"kernel": 3}, {"strides": 2}])
def test_other_convolutions_are_left_alone(rng, options):
    model = network(rng, **options)
    assert [node.name for node in split_concats(model).graph.node] == [node.name for node in model.graph.node]


def test_the_given_model_is_not_changed(rng):
    model = network(rng)
    before = model.SerializeToString(deterministic=True)
    split_concats(model)
    assert model.SerializeToString(deterministic=True) == before
