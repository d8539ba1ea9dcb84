"""Q/DQ graphs of a tiny network against a reference in plain numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_network import CHANNELS, SIGNED, STEPS, convolve, fake, fake_weight, fp16_scale, network, run

from edgedetr.errors import ExportError
from edgedetr.lint.lint import lint
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import Policy, QuantizationPlan, make_plan
from edgedetr.quantization.qdq import insert_qdq, runnable
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.quantized_weight import quantize_weight
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.target import CPU, TENSORRT, Target, fp16_scales, weight_bits


@pytest.fixture(params=[False, True], ids=["chain", "residual"])
def case(request, rng):
    model = network(rng, request.param)
    images = rng.uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    plan = make_plan(GraphIndex(model), Policy("all"))
    names = tensors_to_observe(GraphIndex(model), plan)
    values = dict(zip(names, run(model, images, names)))
    amax = share_pool_ranges(model, {name: 0.9 * float(np.abs(value).max()) for name, value in values.items()})
    return model, images, plan, amax


def integer_weights(model: ModelProto) -> dict[str, np.ndarray]:
    weights = [item for item in model.graph.initializer if item.name.endswith("weight_quantized")]
    return {item.name: numpy_helper.to_array(item) for item in weights}


def test_tensorrt_graph_without_optimizations_equals_the_numpy_reference(rng):
    model = network(rng, residual=True)
    images = rng.uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    plan = make_plan(GraphIndex(model), Policy("all"))
    amax = {"images": 250.0, "r0": 200.0, "r1": 300.0, "tokens": 280.0}
    w = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer}
    first = np.maximum(convolve(fake(images[0], amax["images"]), fake_weight(w["w0"]), w["b0"], 1), 0)
    second = convolve(fake(first, amax["r0"]), fake_weight(w["w1"]), w["b1"], 1)
    second = np.maximum(second + fake(first, amax["r0"]), 0)
    logits = convolve(fake(second, amax["r1"]), fake_weight(w["w2"]), w["b2"], 0)
    matrix = fake_weight(w["m"].T[:, :, None, None])[:, :, 0, 0].T
    boxes = fake(second.reshape(1, 64, CHANNELS), amax["tokens"]) @ matrix + w["mb"]
    actual = run(insert_qdq(GraphIndex(model), plan, amax, TENSORRT), images)
    # A value within float32 rounding of a tie may fall to the other level: a step of r1 times a weight, at few pixels.
    for expected, value in ((logits[None], actual[0]), (boxes, actual[1])):
        assert np.quantile(np.abs(expected - value), 0.98) < 1e-3
        assert np.abs(expected - value).max() < 300 / 127


def test_every_activation_is_within_half_a_step_and_every_weight_too(case):
    model, images, plan, amax = case
    for target in (TENSORRT, SIGNED, CPU):
        graph = insert_qdq(GraphIndex(model), plan, amax, target)
        names = [name for name in amax if f"{name}_dequantized" in {o for n in graph.graph.node for o in n.output}]
        values = run(graph, images, [*names, *(f"{name}_dequantized" for name in names)])
        for name, before, after in zip(names, values, values[len(names) :]):
            step = float(fp16_scale(amax[name] / 127)) if target.fp16 else amax[name] / 127
            inside = np.abs(before) <= amax[name]
            assert np.abs(after - before)[inside].max() <= step / 2 * (1 + 1e-5), name  # float32 division
        floats = {
            layer.node: numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == layer.weight))
            for layer in plan.layers
        }
        for layer in plan.layers:
            constants = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
            scale = constants[f"{layer.node}.weight_scale"]
            shape = [-1 if i == layer.axis else 1 for i in range(floats[layer.node].ndim)]
            restored = constants[f"{layer.node}.weight_quantized"] * scale.reshape(shape)
            # 127 * scale is the largest weight only up to float32 rounding.
            assert (np.abs(restored - floats[layer.node]) <= scale.reshape(shape) * (0.5 + 1e-4)).all()


def test_steps_for_tensorrt_are_normal_fp16_numbers_and_larger_by_a_thousandth_at_most(rng):
    wanted = np.concatenate([10.0 ** rng.uniform(-9, 4, 1000), STEPS[:50], [6.2e-5, 1.0, 2.0]]).astype(np.float32)
    found = fp16_scales(wanted)
    np.testing.assert_array_equal(found, fp16_scale(wanted))
    assert (found.astype(np.float16).astype(np.float32) == found).all()
    normal = wanted >= 2.0**-14
    assert (found[normal] <= wanted[normal] * (1 + 2**-10)).all()
    assert (found[~normal] == np.float32(2.0**-14)).all()


def test_both_targets_store_the_same_weights_and_the_cpu_grid_holds_every_level_of_the_signed_one(case):
    model, _, plan, amax = case
    signed, unsigned = insert_qdq(GraphIndex(model), plan, amax, SIGNED), insert_qdq(GraphIndex(model), plan, amax, CPU)
    a, b = integer_weights(signed), integer_weights(unsigned)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)

    def levels(graph: ModelProto, name: str) -> np.ndarray:
        constants = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
        zero = constants[f"{name}_zero_point"]
        info = np.iinfo(zero.dtype)
        return (np.arange(info.min, info.max + 1) - int(zero)) * float(constants[f"{name}_scale"])

    made = {name for node in signed.graph.node for name in node.output}
    for name in [*(layer.data for layer in plan.layers), *(item.tensor for item in plan.residuals)]:
        assert f"{name}_quantized" in made
        ours, theirs = levels(signed, name), levels(unsigned, name)
        if theirs.min() >= 0:
            ours = ours[ours >= 0]
        # Scales are float32 and halving is exact.
        assert np.isclose(theirs[None], ours[:, None], rtol=1e-6, atol=1e-9).any(axis=1).all(), name


def test_targets_agree_within_a_step_of_the_output_on_a_chain(rng):
    model = network(rng, residual=False)
    images = rng.uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    plan = make_plan(GraphIndex(model), Policy("all"))
    names = tensors_to_observe(GraphIndex(model), plan)
    amax = {name: float(np.abs(value).max()) for name, value in zip(names, run(model, images, names))}
    signed, unsigned = (run(insert_qdq(GraphIndex(model), plan, amax, target), images) for target in (TENSORRT, CPU))
    exact = run(model, images)
    for a, b, reference in zip(signed, unsigned, exact):
        # The CPU grid of non-negative tensors is twice as fine, so the two differ, by less than INT8 costs at all.
        assert np.abs(a - b).max() <= max(np.abs(a - reference).max(), np.abs(reference).max() / 127)


@pytest.mark.parametrize("target", [TENSORRT, CPU], ids=lambda d: d.name)
def test_optimized_kernels_stay_near_the_unoptimized_graph(case, target: Target):
    model, images, plan, amax = case
    if target is CPU:  # 7 bits where this CPU's 16-bit sums would saturate: a fifth of the largest value
        target = replace(CPU, weight_bits=weight_bits("auto"))
    graph = insert_qdq(GraphIndex(model), plan, amax, target)
    for exact, fast in zip(run(graph, images), run(graph, images, optimize=True)):
        # Integer kernels round ties their own way: one step of the last quantized tensor through the last weights.
        assert np.abs(exact - fast).max() <= 0.02 * np.abs(exact).max()


def test_cpu_graph_runs_integer_kernels_only_for_what_the_plan_names(case, tmp_path):
    model, _, plan, amax = case
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    graph = runnable(insert_qdq(GraphIndex(model), plan, amax, CPU), CPU)
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("QLinearConv") == 2, kinds  # the third one gives the float output itself
    assert kinds.count("QGemm") == 1 and "Gemm" not in kinds, kinds


def test_the_graph_for_tensorrt_is_legal_and_the_one_for_a_cpu_is_not_mistaken_for_it(case):
    model, _, plan, amax = case
    assert lint(insert_qdq(GraphIndex(model), plan, amax, SIGNED)) == ()
    found = lint(insert_qdq(GraphIndex(model), plan, amax, CPU))
    # uint8 activations, and biases of int32, which TensorRT leaves float.
    assert {finding.rule for finding in found if finding.worst == "error"} == {"zero-point", "operator-type"}


def test_a_channel_of_zeros_keeps_its_bias():
    weight = np.zeros((2, 4, 1, 1), np.float32)
    weight[0] = 0.5
    bias = np.array([0.1, 7.0], np.float32)
    found = quantize_weight(weight, 0, bias=bias, data_scale=0.01)
    assert (found.values[1] == 0).all()
    integer = np.rint(bias / (found.scale.astype(np.float64) * 0.01))
    assert np.abs(integer).max() < 2**31
    assert np.allclose(integer * found.scale * 0.01, bias, rtol=1e-6)


def test_seven_bit_weights_leave_room_for_a_pair_of_products():
    weight = np.random.default_rng(1).normal(size=(8, 16, 3, 3)).astype(np.float32)
    values = quantize_weight(weight, 0, bits=7).values.astype(int)
    assert np.abs(values).max() == 63
    assert 2 * 255 * 63 < 2**15  # what VPMADDUBSW adds without saturating


def test_a_range_that_is_missing_is_named(case):
    model, _, plan, amax = case
    with pytest.raises(ExportError, match="no range for tensor 'r1'.*run: edgedetr export"):
        insert_qdq(GraphIndex(model), plan, {name: value for name, value in amax.items() if name != "r1"}, TENSORRT)


@pytest.mark.parametrize("target", [TENSORRT, CPU], ids=lambda d: d.name)
def test_a_pool_between_convolutions_runs_on_integers_and_loses_nothing(rng, target: Target):
    weights = {"w0": rng.normal(0, 0.3, (CHANNELS, 3, 3, 3)), "w1": rng.normal(0, 0.1, (CHANNELS, CHANNELS, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["images", "w0"], ["c0"], "conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu"),
        helper.make_node("MaxPool", ["r0"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "w1"], ["y"], "conv1"),
    ]
    graph = helper.make_graph(
        nodes,
        "pool",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CHANNELS, 4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    plan = make_plan(GraphIndex(model), Policy("all"))
    amax = share_pool_ranges(model, {"images": 255.0, "r0": 200.0, "p": 150.0})
    assert amax["p"] == 200.0
    images = rng.uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    before, after = run(insert_qdq(GraphIndex(model), plan, amax, target), images, ["r0_quantized", "p_quantized"])
    np.testing.assert_array_equal(after, before.reshape(1, CHANNELS, 4, 2, 4, 2).max(axis=(3, 5)))


def test_a_plan_without_anything_to_quantize_is_an_error(rng):
    with pytest.raises(ExportError, match="leaves nothing to quantize"):
        make_plan(GraphIndex(network(rng, False)), Policy("none", quantize=("Gemm",)))


def test_names_of_float_nodes_and_outputs_survive(case):
    model, _, plan, amax = case
    graph = insert_qdq(GraphIndex(model), plan, amax, TENSORRT)
    assert isinstance(plan, QuantizationPlan)
    assert [item.name for item in graph.graph.output] == ["logits", "boxes"]
    assert {node.name for node in model.graph.node} <= {node.name for node in graph.graph.node}
