"""Quantized matrix products as the Gemm that ONNX Runtime runs in integers, against the graph before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_network import run

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.integer_products import integer_products
from edgedetr.quantization.policy import Policy, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.target import CPU

BATCH, TOKENS, INPUTS, HIDDEN, OUTPUTS = 3, 10, 24, 32, 20


def feed_forward(rng: np.random.Generator, batch: int | str, second: str = "MatMul") -> ModelProto:
    """images [B, 10, 24] -> MatMul, Add, Relu -> MatMul, Add -> y; and a product without a bias of the same input -> z.

    second   "Gemm": the second product is one, of the tokens as rows, with a transposed weight
    """
    constants = {
        "w1": rng.normal(0, 0.2, (INPUTS, HIDDEN)),
        "b1": rng.normal(0, 0.5, HIDDEN),
        "w2": rng.normal(0, 0.2, (HIDDEN, OUTPUTS)),
        "b2": rng.normal(0, 0.5, OUTPUTS),
        "w3": rng.normal(0, 0.2, (INPUTS, OUTPUTS)),
    }
    nodes = [
        helper.make_node("MatMul", ["images", "w1"], ["p1"], "first/MatMul"),
        helper.make_node("Add", ["b1", "p1"], ["h"], "first/Add"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["images", "w3"], ["z"], "third/MatMul"),
    ]
    if second == "Gemm":
        constants["w2"] = constants["w2"].T.copy()
        nodes.append(helper.make_node("Reshape", ["r", "rows"], ["flat"], "flatten"))
        nodes.append(helper.make_node("Gemm", ["flat", "w2", "b2"], ["y"], "second/Gemm", transB=1))
    else:
        nodes.append(helper.make_node("MatMul", ["r", "w2"], ["p2"], "second/MatMul"))
        nodes.append(helper.make_node("Add", ["p2", "b2"], ["y"], "second/Add"))
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, TOKENS, INPUTS])],
        [helper.make_empty_tensor_value_info(name) for name in ("y", "z")],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
        + [numpy_helper.from_array(np.array([-1, HIDDEN]), "rows")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def quantized(model: ModelProto) -> ModelProto:
    plan = make_plan(GraphIndex(model), Policy("all"))
    assert len(plan.layers) == 3
    return insert_qdq(GraphIndex(model), plan, {"images": 4.0, "r": 6.0, "flat": 6.0}, CPU)


def optimized(model: ModelProto, path: Path) -> Counter[str]:
    """How many nodes of each operator ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """Equal up to a step of an int32 bias, 1e-4, and, in few tokens, a hidden value at a tie: 0.02 times a weight."""
    difference = np.abs(one - other)
    assert np.quantile(difference, 0.8) < 2e-4
    assert difference.max() < 0.03


@pytest.mark.parametrize("batch, second", [(BATCH, "MatMul"), ("batch", "MatMul"), (BATCH, "Gemm")])
def test_the_arithmetic_stays_and_every_product_runs_in_integers(rng, tmp_path, batch: int | str, second: str):
    before = quantized(feed_forward(rng, batch, second))
    after = integer_products(before)
    images = rng.normal(0, 1.5, (BATCH, TOKENS, INPUTS)).astype(np.float32)
    for exact, written, fast in zip(run(before, images), run(after, images), run(after, images, optimize=True)):
        assert written.shape == exact.shape
        assert_same(written, exact)
        assert_same(fast, exact)
    kinds = optimized(after, tmp_path / "after.onnx")
    assert kinds["QGemm"] == 3
    assert not kinds.keys() & {"Gemm", "MatMul", "Relu"}, kinds
    # What the form is for: without it, the products with a bias run in float.
    assert optimized(before, tmp_path / "before.onnx")["QGemm"] == 0


def test_readers_of_one_tensor_share_its_rows_and_names_of_nodes_and_results_stay(rng):
    after = integer_products(quantized(feed_forward(rng, BATCH)))
    kinds = Counter(node.op_type for node in after.graph.node)
    # The input as rows, and the two results as tokens; the hidden tensor stays two-dimensional.
    assert (kinds["Gemm"], kinds["Reshape"]) == (3, 3)
    assert {"first/MatMul", "second/MatMul", "third/MatMul"} <= {
        n.name for n in after.graph.node if n.op_type == "Gemm"
    }
    assert {"y", "z"} <= {name for node in after.graph.node for name in node.output}


@pytest.mark.parametrize("what", ["open sizes", "two additions", "bias of another rank"])
def test_a_product_that_no_gemm_computes_is_left_as_it_is(rng, what: str):
    model = feed_forward(rng, BATCH)
    images = rng.normal(0, 1.5, (BATCH, TOKENS, INPUTS)).astype(np.float32)
    if what == "open sizes":
        for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim, ("batch", "tokens")):
            dim.dim_param = name
    elif what == "two additions":
        model.graph.node.append(helper.make_node("Relu", ["p2"], ["other"], "other"))
        model.graph.output.append(helper.make_empty_tensor_value_info("other"))
    else:
        bias = next(item for item in model.graph.initializer if item.name == "b2")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias).reshape(1, 1, 1, -1), "b2"))
    before = quantized(model)
    after = integer_products(before)
    kinds = Counter(node.op_type for node in after.graph.node)
    assert (kinds["Gemm"], kinds["Add"]) == ((0, 2) if what == "open sizes" else (3, 1))
    for exact, written in zip(run(before, images), run(after, images)):
        assert written.shape == exact.shape
        assert_same(written, exact)
