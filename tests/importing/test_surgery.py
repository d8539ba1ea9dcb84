"""Surgery on external graphs keeps their results."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph_of, run_model
from onnx import TensorProto, helper, numpy_helper

from edgedetr.importing.surgery import annotate_nodes, fold_scales, name_nodes
from edgedetr.quantization.policy import get_role


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["batch-norm", "mul-add", "scalar", "flat"])
def test_scales_are_folded_into_the_convolution(form, biased, rng):
    constants = {"w": rng.normal(size=(5, 4, 3, 3)), **({"wb": rng.normal(size=5)} if biased else {})}
    nodes = [helper.make_node("Conv", ["x", "w", *(["wb"] if biased else [])], ["c"], "conv")]
    if form == "batch-norm":
        constants |= {
            "g": rng.normal(size=5),
            "s": rng.normal(size=5),
            "m": rng.normal(size=5),
            "v": rng.uniform(0.1, 2, 5),
        }
        nodes.append(helper.make_node("BatchNormalization", ["c", "g", "s", "m", "v"], ["n"], "norm", epsilon=1e-3))
    else:
        shape = {"mul-add": (1, 5, 1, 1), "scalar": (), "flat": (5, 1, 1)}[form]
        constants |= {"g": rng.normal(size=shape), "s": rng.normal(size=shape)}
        nodes += [helper.make_node("Mul", ["g", "c"], ["k"], "mul"), helper.make_node("Add", ["k", "s"], ["n"], "add")]
    model = graph_of([*nodes, helper.make_node("Relu", ["n"], ["y"], "relu")], constants)
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    before = run_model(model, x=image)[0]
    assert fold_scales(model) == len(nodes) - 1
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]
    # float32 rounding of weights that were folded in float64; values are around 10
    np.testing.assert_allclose(run_model(model, x=image)[0], before, atol=1e-4)


def test_what_is_read_twice_or_is_no_scale_stays(rng):
    shared = graph_of(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
            helper.make_node("Mul", ["c", "g"], ["k"], "m"),
            helper.make_node("Add", ["k", "c"], ["y"], "a"),
        ],
        {"w": rng.normal(size=(5, 4, 3, 3)), "g": rng.normal(size=(1, 5, 1, 1))},
    )
    assert fold_scales(shared) == 0
    along_width = graph_of(
        [helper.make_node("Conv", ["x", "w"], ["c"], "conv"), helper.make_node("Mul", ["c", "g"], ["y"], "m")],
        {"w": rng.normal(size=(5, 4, 3, 3)), "g": rng.normal(size=(1, 1, 1, 4))},
    )
    assert fold_scales(along_width) == 0


def test_every_node_gets_a_name_of_its_own():
    model = graph_of(
        [
            helper.make_node("Relu", ["x"], ["a"], "same"),
            helper.make_node("Relu", ["a"], ["b"], "same"),
            helper.make_node("Relu", ["b"], ["y"]),
        ],
        {},
    )
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names[0] == "same"
    assert len(set(names)) == 3
    assert all(names)


def test_roles_follow_from_rows_and_paths_and_from_names_of_our_own_exports():
    """Five tokens of four channels; the two with the best scores become queries."""
    nodes = [
        helper.make_node("Relu", ["x"], ["tokens"], "backbone"),
        helper.make_node("MatMul", ["tokens", "w1"], ["projected"], "/selector/project/MatMul"),
        helper.make_node("MatMul", ["projected", "w1"], ["scores"], "score_head"),
        helper.make_node("ReduceMax", ["scores"], ["best"], "best", axes=[2], keepdims=0),
        helper.make_node("TopK", ["best", "k"], ["top", "index"], "top_k"),
        helper.make_node("Gather", ["projected", "index"], ["picked"], "pick", axis=1),
        helper.make_node("Squeeze", ["picked", "one"], ["queries"], "squeeze"),
        helper.make_node("MatMul", ["queries", "w1"], ["hidden"], "layer"),
        helper.make_node("MatMul", ["tokens", "w1"], ["values"], "memory"),
        helper.make_node("ReduceMean", ["values"], ["mean"], "pool", axes=[1], keepdims=1),
        helper.make_node("Add", ["hidden", "mean"], ["y"], "add"),
    ]
    constants = {
        "w1": numpy_helper.from_array(np.eye(4, dtype=np.float32), "w1"),
        "k": numpy_helper.from_array(np.array([2]), "k"),
        "one": numpy_helper.from_array(np.array([0]), "one"),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    annotate_nodes(model, 2)
    assert {node.name: get_role(node) for node in model.graph.node} == {
        "backbone": "",
        "/selector/project/MatMul": "memory_projection",
        "score_head": "query_selection",
        "best": "query_selection",
        "top_k": "query_selection",
        "pick": "query_selection",
        "squeeze": "decoder",
        "layer": "decoder",
        "memory": "",
        "pool": "",
        "add": "decoder",
    }
