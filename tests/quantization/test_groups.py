"""Groups of small graphs; those of every member are in tests/models/test_members_deployed.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.groups import floor_of, groups_of
from edgedetr.quantization.placement import Placement, RangesByObserver, plan_for, quantized_model
from edgedetr.quantization.policy import Policy, set_role
from edgedetr.quantization.qdq import runnable
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.target import CPU, TENSORRT


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


HEAD = 16  # channels of a head: the least for which an integer product is worth it
INTEGER = {"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul"}
FLOAT = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"}


def attention_network(rng: np.random.Generator) -> ModelProto:
    """images -> Conv, Relu -> Conv + skip, Relu -> tokens -> q, k, v -> two products around a Softmax -> Linear."""
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", **pads),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], "conv1", **pads),
        helper.make_node("Add", ["c1", "r0"], ["s1"], "sum"),
        helper.make_node("Relu", ["s1"], ["r1"], "relu1"),
        helper.make_node("Reshape", ["r1", "flat"], ["f"], "flatten"),
        helper.make_node("Transpose", ["f"], ["tokens"], "turn", perm=[0, 2, 1]),
    ]
    for part in "qkv":
        nodes += [
            helper.make_node("MatMul", ["tokens", f"w{part}"], [f"m{part}"], f"{part}/MatMul"),
            helper.make_node("Add", [f"b{part}", f"m{part}"], [f"a{part}"], f"{part}/Add"),
            helper.make_node("Reshape", [f"a{part}", "heads"], [f"h{part}"], f"{part}/Reshape"),
            helper.make_node("Transpose", [f"h{part}"], [part], f"{part}/Transpose", perm=[0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("Transpose", ["k"], ["kt"], "k/turn", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], "attention/MatMul"),
        helper.make_node("Softmax", ["qk"], ["p"], "attention/Softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["pv"], "attention/MatMul_1"),
        helper.make_node("Transpose", ["pv"], ["t"], "attention/Transpose", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "rows"], ["o"], "attention/Reshape"),
        helper.make_node("MatMul", ["o", "wo"], ["mo"], "out/MatMul"),
        helper.make_node("Add", ["bo", "mo"], ["y"], "out/Add"),
    ]
    width = 2 * HEAD
    constants = {"w0": rng.normal(0, 0.2, (width, 3, 3, 3)), "w1": rng.normal(0, 0.1, (width, width, 3, 3))}
    constants |= {f"w{part}": rng.normal(0, 0.2, (width, width)) for part in "qkvo"}
    constants |= {f"b{part}": rng.normal(0, 0.1, width) for part in "01qkvo"}
    model = model_of(nodes, [1, 3, 6, 6], **constants)
    for name, value in (("flat", [1, width, 36]), ("heads", [1, 36, 2, HEAD]), ("rows", [1, 36, width])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    model.graph.input[0].name = "images"
    model.graph.node[0].input[0] = "images"
    model.ir_version = 9
    return model


def kernels(model: ModelProto, path: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs: those of its optimized graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_switching_one_group_switches_its_own_kernels_and_no_others(rng, tmp_path):
    model = attention_network(rng)
    graph, policy = GraphIndex(model), Policy("all")
    found = groups_of(graph, policy)
    assert [(group.kind, len(group.nodes)) for group in found] == [
        *[("convolution", 1)] * 2,
        *[("linear", 1)] * 3,
        ("attention", 2),
        ("linear", 1),
    ]
    every = Placement(tuple(group.id for group in found))
    names = tensors_to_observe(graph, plan_for(graph, policy, every))
    images = rng.uniform(0, 1, (1, 3, 6, 6)).astype(np.float32)
    values = {"images": images, **GraphSession(model, [n for n in names if n != "images"]).run({"images": images})}
    ranges = RangesByObserver(
        "minmax", {"minmax": {name: float(np.abs(value).max()) for name, value in values.items()}}
    )
    before = kernels(model, tmp_path / "m.onnx")
    for placement in (*(Placement((group.id,)) for group in found), every):
        switched = sum(len(group.nodes) for group in found if group.id in placement.int8)
        after = kernels(runnable(quantized_model(graph, policy, placement, ranges, CPU), CPU), tmp_path / "m.onnx")
        assert sum(after[kind] for kind in INTEGER) == switched, placement
        assert sum(before[kind] - after[kind] for kind in FLOAT) == switched, placement


def test_both_products_of_an_attention_equal_the_rounded_arithmetic(rng):
    """softmax(Q K) V with Q, K, V and the probabilities each on its grid of amax / 127."""
    model = attention_network(rng)
    graph, policy = GraphIndex(model), Policy("all")
    images = rng.uniform(0, 1, (1, 3, 6, 6)).astype(np.float32)
    values = GraphSession(model, ["q", "kt", "v", "p", "pv"]).run({"images": images})
    amax = {name: float(np.abs(values[name]).max()) for name in ("q", "kt", "p", "v")}
    placement = Placement(("attention/MatMul",))
    ranges = RangesByObserver("minmax", {"minmax": amax})
    for target in (replace(TENSORRT, fp16=False), CPU):
        quantized = quantized_model(graph, policy, placement, ranges, target)
        assert "p_quantized" in {name for node in quantized.graph.node for name in node.output}
        zero = next(item for item in quantized.graph.initializer if item.name == "p_zero_point")
        assert int(numpy_helper.to_array(zero)) == 0  # probabilities are never negative
        steps = {name: np.float64(largest) / 127 for name, largest in amax.items()}
        if target is CPU:
            steps["p"] /= 2
        grid = {name: np.round(values[name] / step) * step for name, step in steps.items() if name != "p"}
        scores = grid["q"] @ grid["kt"]
        raw = np.exp(scores - scores.max(-1, keepdims=True))
        p = np.clip(np.round(raw / raw.sum(-1, keepdims=True) / steps["p"]), 0, 127 if target is not CPU else 255)
        found = GraphSession(quantized, ["pv"]).run({"images": images})["pv"]
        expected = p * steps["p"] @ grid["v"]
        # A value at a tie may fall to the other level: few do.
        assert np.quantile(np.abs(found - expected), 0.98) < 1e-4 * np.abs(expected).max()
        assert np.abs(found - expected).max() < 3 * steps["p"] * amax["v"]
