"""FP16 graphs: one type per node, float32 where FP16 is too small, and the same detections."""

from __future__ import annotations

from collections import Counter

import members
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from edgedetr.errors import ExportError
from edgedetr.models import FAMILY
from edgedetr.onnx_graph.fp16 import MAX_ABSMAX, activation_absmax, convert_to_fp16
from edgedetr.onnx_graph.fp16_simulation import simulate_fp16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import Policy, PolicyRule, load_policy, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.target import TENSORRT

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16
SIZE = (1, 16, 8, 8)


def graph(nodes: list[NodeProto], outputs: dict[str, list[int]] | None = None, **constants: np.ndarray) -> ModelProto:
    """images [1, 16, 8, 8] -> logits, or the outputs given by name and shape."""
    outputs = outputs or {"logits": list(SIZE)}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", FP32, SIZE)],
        [helper.make_tensor_value_info(name, FP32, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def conv(read: str, given: str, name: str) -> NodeProto:
    return helper.make_node("Conv", [read, "w"], [given], name)


W = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)


def run(model: ModelProto | bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images})))


def types(model: ModelProto) -> dict[str, int]:
    inferred = shape_inference.infer_shapes(model).graph
    found = {
        item.name: item.type.tensor_type.elem_type for item in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    return {**found, **{item.name: item.data_type for item in model.graph.initializer}}


def kind_of(model: ModelProto, name: str) -> int:
    """Type in which a node computes."""
    node = next(node for node in model.graph.node if node.name == name)
    return types(model)[node.output[0]]


@pytest.fixture(scope="module", params=FAMILY)
def member(request) -> tuple[str, ModelProto, ModelProto, np.ndarray]:
    """(name, float graph, its FP16 form, an image)."""
    model = onnx.load(str(members.exported(request.param)))
    images = members.sample_images(1).numpy()
    return (
        request.param,
        model,
        convert_to_fp16(
            model, activation_absmax(GraphIndex(model), [images]), load_policy("default").float32_nodes(model)
        ).model,
        images,
    )


def test_every_node_of_every_member_reads_and_gives_one_float_type(member):
    _, model, fp16, images = member
    onnx.checker.check_model(fp16)
    found = types(fp16)
    for node in fp16.graph.node:
        if node.op_type == "Cast":
            assert found[node.input[0]] != found[node.output[0]], f"{node.name} casts to what it reads"
            continue
        fixed = {1, 2} if node.op_type == "Resize" else set()
        used = {found[name] for i, name in enumerate(node.input) if name and i not in fixed}
        assert len((used | {found[name] for name in node.output if name}) & {FP32, FP16}) <= 1, node.name
    assert [found[item.name] for item in (*fp16.graph.input, *fp16.graph.output)] == [FP32] * 3
    run(fp16, images)  # ONNX Runtime refuses a graph in which types do not fit
    assert {node.name for node in model.graph.node if node.op_type != "Cast"} <= {node.name for node in fp16.graph.node}


def test_layers_are_fp16_and_indices_boxes_and_ranks_are_not(member):
    _, model, _, _ = member
    fp16 = convert_to_fp16(model, {}).model  # without the ranges of random weights, which do leave FP16
    kinds: dict[str, Counter[int]] = {}
    found = types(fp16)
    for node in fp16.graph.node:
        kinds.setdefault(node.op_type, Counter())[found[node.output[0]]] += 1
    for layer in ("Conv", "MatMul", "Gemm", "LayerNormalization", "Softmax"):
        assert kinds.get(layer, Counter())[FP32] == 0, layer
    for exact in ("TopK", "Floor", "Log", "Exp", "Sin", "Cos", "GridSample"):
        assert kinds.get(exact, Counter())[FP16] == 0, exact
    for node in fp16.graph.node:
        if node.op_type == "Cast" and found[node.output[0]] in (TensorProto.INT64, TensorProto.INT32):
            assert found[node.input[0]] != FP16, f"{node.name}: an index from FP16, which has no odd integer above 2048"
    assert len(fp16.SerializeToString()) < 0.75 * len(model.SerializeToString())


def test_the_simulation_of_every_member_stays_near_the_float_graph(member):
    _, model, fp16, images = member
    exact = run(model, images)
    simulated = run(_simulated(fp16.SerializeToString()), images)
    assert all(np.isfinite(value).all() for value in simulated.values())
    # Queries of two-stage members may come in another order: compare what is found, sorted by class logit.
    for key, limit in (("logits", 0.06), ("boxes", 0.03)):
        one, other = (np.sort(found[key].reshape(-1)) for found in (exact, simulated))
        assert np.abs(one - other).mean() <= limit * max(1.0, np.abs(one).max()), key


def _simulated(data: bytes) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        return simulate_fp16(path)


def test_a_tensor_that_was_seen_too_large_stays_float32_with_all_that_reads_it():
    model = graph(
        [
            conv("images", "a", "one"),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            conv("r", "b", "two"),
            conv("b", "logits", "three"),
        ],
        w=W,
    )
    fine = {"images": 1.0, "a": 10.0, "r": 10.0, "b": 10.0, "logits": 10.0}
    assert convert_to_fp16(model, fine).fp32_nodes == {}
    found = convert_to_fp16(model, {**fine, "r": 2 * MAX_ABSMAX}).fp32_nodes
    assert set(found) == {"relu", "two"}
    assert "r reaches 6e+04, FP16 ends at 65504" in found["two"]
    fp16 = convert_to_fp16(model, {**fine, "r": 2 * MAX_ABSMAX}).model
    assert [kind_of(fp16, name) for name in ("one", "relu", "two", "three")] == [FP16, FP32, FP32, FP16]


def test_a_float32_node_keeps_an_overflow_away(rng):
    """300 * 300 * 1e-3 is infinite where no magnitude was observed; with the observed one it is 90."""
    model = graph(
        [
            conv("images", "a", "one"),
            helper.make_node("Mul", ["a", "a"], ["square"], "square"),
            helper.make_node("Mul", ["square", "small"], ["s"], "scaled"),
            conv("s", "logits", "two"),
        ],
        w=W,
        small=np.array(1e-3, np.float32),
    )
    images = np.full(SIZE, 300, np.float32)
    # The last layer multiplies the infinity by its zeros as well.
    assert not np.isfinite(
        run(_simulated(convert_to_fp16(model, {}).model.SerializeToString()), images)["logits"]
    ).any()
    absmax = activation_absmax(GraphIndex(model), [images])
    assert absmax["square"] == pytest.approx(90000)
    kept = run(_simulated(convert_to_fp16(model, absmax).model.SerializeToString()), images)["logits"]
    np.testing.assert_allclose(kept, 90, rtol=1e-3)


def test_a_norm_whose_squares_leave_fp16_stays_float32():
    model = graph(
        [
            conv("images", "a", "one"),
            helper.make_node("LayerNormalization", ["a", "scale"], ["n"], "norm"),
            conv("n", "logits", "two"),
        ],
        w=W,
        scale=np.ones(8, np.float32),
    )
    assert convert_to_fp16(model, {"a": 100.0}).fp32_nodes == {}
    assert "its square would leave FP16" in convert_to_fp16(model, {"a": 200.0}).fp32_nodes["norm"]


@pytest.mark.parametrize("value, stays", [(1e-5, True), (7e4, True), (1e-3, False), (0.0, False), (6.2e-5, False)])
def test_constants_that_fp16_cannot_hold_keep_their_node_in_float32(value, stays):
    model = graph(
        [conv("images", "a", "one"), helper.make_node("Add", ["a", "c"], ["s"], "sum"), conv("s", "logits", "two")],
        w=W,
        c=np.array(value, np.float32),
    )
    assert ("sum" in convert_to_fp16(model, {}).fp32_nodes) == stays
    fp16 = convert_to_fp16(model, {}).model
    constant = next(item for item in fp16.graph.initializer if item.name in ("c", "c_half"))
    assert (constant.data_type == FP32) == stays


def test_what_the_policy_names_stays_float32_and_gets_casts_around_it():
    model = graph([conv("images", "a", "body/one"), conv("a", "b", "head/two"), conv("b", "logits", "tail/three")], w=W)
    rule = PolicyRule("a reason", match=("head/*",))
    found = convert_to_fp16(model, {}, Policy("p", float32_rules=(rule,)).float32_nodes(model))
    assert found.fp32_nodes == {"head/two": "a reason"}
    fp16 = found.model
    assert [kind_of(fp16, name) for name in ("body/one", "head/two")] == [FP16, FP32]
    weights = {item.name: item.data_type for item in fp16.graph.initializer}
    assert weights == {"w": FP32, "w_half": FP16}


def test_pixels_are_normalized_before_they_are_rounded():
    model = graph(
        [helper.make_node("Mul", ["images", "scale"], ["x"], "normalize"), conv("x", "logits", "one")],
        w=W,
        scale=np.array(1 / 255, np.float32),
    )
    assert convert_to_fp16(model, {}).fp32_nodes == {"normalize": "computed from float32 values alone"}


def test_a_pair_of_int8_has_fp16_scales_and_the_type_of_its_layer(rng):
    nodes = [conv("images", "a", "one"), conv("a", "b", "two"), conv("b", "logits", "three")]
    model = graph(nodes, w=rng.normal(0, 0.2, (16, 16, 1, 1)).astype(np.float32))
    absmax = activation_absmax(GraphIndex(model), [rng.normal(0, 2, SIZE).astype(np.float32)])
    quantized = insert_qdq(GraphIndex(model), make_plan(GraphIndex(model), Policy("all")), absmax, TENSORRT)
    for largest, kind in ((absmax["a"], FP16), (2 * MAX_ABSMAX, FP32)):
        fp16 = convert_to_fp16(quantized, {**absmax, "a": largest}).model
        scales = {item.name: numpy_helper.to_array(item) for item in fp16.graph.initializer if "_scale" in item.name}
        # Both nodes of a pair have one type; a layer in float32 has its pairs in float32.
        assert kind_of(fp16, "two") == kind_of(fp16, "a_DequantizeLinear") == kind
        assert kind_of(fp16, "three") == kind_of(fp16, "b_DequantizeLinear") == FP16
        assert all((scale >= 2.0**-14).all() for scale in scales.values())
        before = {item.name: numpy_helper.to_array(item) for item in quantized.graph.initializer}
        for name, scale in scales.items():  # no scale has changed by its type
            np.testing.assert_array_equal(scale.astype(np.float32), before[name.removesuffix("_half")])
        run(fp16, np.zeros(SIZE, np.float32))


def test_a_scale_that_is_no_fp16_number_is_a_defect_that_is_reported(rng):
    from dataclasses import replace

    model = graph([conv("images", "a", "one"), conv("a", "logits", "two")], w=W)
    quantized = insert_qdq(
        GraphIndex(model),
        make_plan(GraphIndex(model), Policy("all")),
        {"images": 1.0, "a": 1.0},
        replace(TENSORRT, fp16=False),
    )
    with pytest.raises(ExportError, match="a scale is no normal FP16 number.*quantize again"):
        convert_to_fp16(quantized, {})


def test_branches_and_unknown_operators_are_refused():
    inner = helper.make_graph(
        [helper.make_node("Relu", ["images"], ["y"])], "inner", [], [helper.make_tensor_value_info("y", FP32, SIZE)]
    )
    branch = helper.make_node("If", ["flag"], ["logits"], "choice", then_branch=inner, else_branch=inner)
    with pytest.raises(ExportError, match="choice: If contains a subgraph"):
        convert_to_fp16(graph([branch], flag=np.array(True)), {})
    model = graph([conv("images", "unknown", "one"), helper.make_node("Relu", ["unknown"], ["logits"], "relu")], w=W)
    model.graph.node[0].CopyFrom(helper.make_node("Mystery", ["images"], ["unknown"], "x", domain="elsewhere"))
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    with pytest.raises(ExportError, match="the type of tensor 'unknown' cannot be inferred"):
        convert_to_fp16(model, {})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(bad):
    model = graph([conv("images", "a", "one"), helper.make_node("Relu", ["a"], ["logits"], "relu")], w=W)
    images = np.zeros(SIZE, np.float32)
    images[0, 3, 2, 2] = bad
    with pytest.raises(ExportError, match="tensor '(images|a)' is (nan|inf)"):
        activation_absmax(GraphIndex(model), [images])


def test_absmax_is_the_largest_magnitude_over_all_images(rng):
    model = graph([conv("images", "a", "one"), helper.make_node("Relu", ["a"], ["logits"], "relu")], w=-W)
    batches = [rng.normal(0, 1, SIZE).astype(np.float32), rng.normal(0, 3, SIZE).astype(np.float32)]
    found = activation_absmax(GraphIndex(model), batches)
    assert found["images"] == found["a"] == max(float(np.abs(batch).max()) for batch in batches)
    assert found["logits"] == max(float((-batch).max()) for batch in batches)
