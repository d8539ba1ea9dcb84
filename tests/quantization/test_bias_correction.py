"""Bias correction against numpy loops, and the property it is for: channel means of INT8 layers are those of float."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_order import KernelOrder
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_network import CHANNELS, SIGNED, convolve, fake, fake_weight, network, run

from edgedetr.lint.lint import lint
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.bias_correction import PARTS, BiasCorrection
from edgedetr.quantization.policy import Policy, QuantizationPlan, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.target import CPU, TENSORRT, Target

TARGETS = pytest.mark.parametrize(
    "target", [TENSORRT, SIGNED, CPU, replace(CPU, weight_bits=7)], ids=["tensorrt", "signed", "cpu", "cpu-7-bit"]
)
LAYERS = {"body/conv0": "c0", "body/conv1": "c1", "head/conv2": "logits", "head/matmul": "boxes"}


def brighter_images(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Darker and lighter ones, so that each has another shift."""
    return [rng.uniform(0, 255 * (i + 1) / count, (1, 3, 8, 8)).astype(np.float32) for i in range(count)]


def ranges(model: ModelProto, plan: QuantizationPlan, images: list[np.ndarray]) -> dict[str, float]:
    """Ranges that clip a tenth of the largest image's reach."""
    names = tensors_to_observe(GraphIndex(model), plan)
    values = [run(model, image, names) for image in images]
    return share_pool_ranges(
        model, {name: 0.9 * max(float(np.abs(v[i]).max()) for v in values) for i, name in enumerate(names)}
    )


def shifts(
    model: ModelProto, quantized: ModelProto, plan: QuantizationPlan, images: list[np.ndarray], parts: int = PARTS
) -> dict[str, np.ndarray]:
    return BiasCorrection(GraphIndex(model), plan.layers, lambda: images).shifts(quantized, plan, parts)


def channel_means(values: np.ndarray) -> np.ndarray:
    """[O] by loops: channels are axis 1 of an image's maps, the last axis of tokens."""
    maps = values[0] if values.ndim == 4 else values[0].T
    found = np.zeros(len(maps))
    for channel, values_of_one in enumerate(maps):
        total, count = 0.0, 0
        for value in values_of_one.ravel().tolist():
            total, count = total + value, count + 1
        found[channel] = total / count
    return found


def mean_errors(model: ModelProto, graph: ModelProto, images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """{layer: [O] mean over the images of float - INT8}, behind the layer's bias."""
    tensors_ = list(LAYERS.values())
    pairs = [(run(model, image, tensors_), run(graph, image, tensors_)) for image in images]
    return {
        layer: np.mean([channel_means(a[i].astype(np.float64) - b[i]) for a, b in pairs], axis=0)
        for i, layer in enumerate(LAYERS)
    }


@pytest.fixture(params=[False, True], ids=["chain", "residual"])
def case(request, rng):
    model = network(rng, request.param)
    images = brighter_images(rng, 4)
    plan = make_plan(GraphIndex(model), Policy("all"))
    return model, images, plan, ranges(model, plan, images)


def test_shifts_equal_loops_over_images_layers_and_channels(rng):
    model = network(rng, residual=False)
    images = brighter_images(rng, 3)
    plan = make_plan(GraphIndex(model), Policy("all"))
    amax = ranges(model, plan, images)
    w = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer}
    expected = {layer: np.zeros(20 if layer == "head/matmul" else CHANNELS) for layer in LAYERS}

    def right(layer: str, exact: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        """What the layers behind read: [C, H, W] with the means of the exact one."""
        for channel in range(len(exact)):
            error = float((exact[channel] - rounded[channel]).mean())
            expected[layer][channel] += error / len(images)
            rounded[channel] += error
        return rounded

    for image in images:
        exact = convolve(image[0], w["w0"], w["b0"], 1)
        rounded = right("body/conv0", exact, convolve(fake(image[0], amax["images"]), fake_weight(w["w0"]), w["b0"], 1))
        exact, rounded = np.maximum(exact, 0), np.maximum(rounded, 0)
        exact = convolve(exact, w["w1"], w["b1"], 1)
        rounded = right("body/conv1", exact, convolve(fake(rounded, amax["r0"]), fake_weight(w["w1"]), w["b1"], 1))
        exact, rounded = np.maximum(exact, 0), np.maximum(rounded, 0)
        right(
            "head/conv2",
            convolve(exact, w["w2"], w["b2"], 0),
            convolve(fake(rounded, amax["r1"]), fake_weight(w["w2"]), w["b2"], 0),
        )
        matrix = fake_weight(w["m"].T[:, :, None, None])[:, :, 0, 0]
        product = matrix @ fake(rounded.reshape(64, CHANNELS), amax["tokens"]).T  # [O, 64]: channels first
        right("head/matmul", w["m"].T @ exact.reshape(64, CHANNELS).T, product)
    found = shifts(model, insert_qdq(GraphIndex(model), plan, amax, TENSORRT), plan, images, parts=1)
    assert found.keys() == expected.keys()
    for layer, shift in found.items():
        # Float32 sums of products of up to 300, and single values that fall to the other side of a tie.
        np.testing.assert_allclose(shift, expected[layer], atol=5e-3 * np.abs(expected[layer]).max() + 1e-4)
        assert np.abs(expected[layer]).max() > 0.02


@TARGETS
def test_on_one_image_the_mean_of_every_channel_of_every_layer_is_that_of_float(case, target: Target):
    model, images, plan, amax = case
    quantized = insert_qdq(GraphIndex(model), plan, amax, target)
    found = shifts(model, quantized, plan, images[-1:])
    before = mean_errors(model, quantized, images[-1:])
    after = mean_errors(model, insert_qdq(GraphIndex(model), plan, amax, target, found), images[-1:])
    for layer in LAYERS:
        largest = np.abs(before[layer]).max()
        # int32 biases are rounded to steps of input times weight, and a tie may fall to the other side behind them.
        assert np.abs(after[layer]).max() < (0.05 if target.int32_bias else 1e-3) * largest, layer


@TARGETS
def test_over_all_images_the_means_are_those_of_float_where_every_layer_is_a_part_of_its_own(case, target: Target):
    model, images, plan, amax = case
    quantized = insert_qdq(GraphIndex(model), plan, amax, target)
    found = shifts(model, quantized, plan, images, parts=len(LAYERS))
    before = mean_errors(model, quantized, images)
    after = mean_errors(model, insert_qdq(GraphIndex(model), plan, amax, target, found), images)
    for layer in LAYERS:
        # int32 biases are rounded to steps of input times weight, and a tie may fall to the other side behind them.
        limit = 0.05 if target.int32_bias else 1e-3
        assert np.abs(after[layer]).max() < limit * np.abs(before[layer]).max(), layer


@TARGETS
def test_in_one_part_half_the_error_of_the_means_goes_although_images_differ_fourfold(case, target: Target):
    model, images, plan, amax = case
    quantized = insert_qdq(GraphIndex(model), plan, amax, target)
    found = shifts(model, quantized, plan, images, parts=1)
    before = mean_errors(model, quantized, images)
    after = mean_errors(model, insert_qdq(GraphIndex(model), plan, amax, target, found), images)
    for layer in LAYERS:
        assert np.abs(after[layer]).mean() < 0.5 * np.abs(before[layer]).mean(), layer


@TARGETS
def test_only_values_of_biases_change(case, target: Target):
    model, images, plan, amax = case
    before = insert_qdq(GraphIndex(model), plan, amax, target)
    after = insert_qdq(GraphIndex(model), plan, amax, target, shifts(model, before, plan, images))
    assert [(n.name, n.op_type, list(n.output)) for n in after.graph.node] == [
        (n.name, n.op_type, list(n.output)) for n in before.graph.node
    ]
    old, new = ({item.name: item for item in graph.graph.initializer} for graph in (before, after))
    differ = {name for name in new if name not in old or old[name] != new[name]}
    ends = (".bias_quantized", ".bias") if target.int32_bias else (".bias",)
    assert differ and all(name.endswith(ends) for name in differ), differ
    assert {name.removesuffix("_quantized").removesuffix(".bias") for name in differ} == {
        "body/conv0",
        "body/conv1",
        "head/conv2",
        "head/add",
    }
    assert target.uint8 or lint(after) == lint(before) == ()


def test_without_shifts_the_bytes_are_those_of_before_and_with_them_always_the_same(case):
    model, images, plan, amax = case
    for target in (TENSORRT, CPU):
        plain = insert_qdq(GraphIndex(model), plan, amax, target)
        assert insert_qdq(GraphIndex(model), plan, amax, target, {}).SerializeToString() == plain.SerializeToString()
        one, two = (
            insert_qdq(GraphIndex(model), plan, amax, target, shifts(model, plain, plan, images)) for _ in range(2)
        )
        assert one.SerializeToString() == two.SerializeToString() != plain.SerializeToString()


def bare(rng: np.random.Generator) -> ModelProto:
    """images -> Conv without bias, Relu -> Gemm with and without bias, and a product that nothing is added to."""
    constants = {
        "w0": rng.normal(0, 0.3, (CHANNELS, 3, 3, 3)),
        "m": rng.normal(0, 0.2, (CHANNELS, 20)),
        "g": rng.normal(0, 0.2, (20, CHANNELS)),
        "gb": rng.normal(0, 0.2, 20),
    }
    nodes = [
        helper.make_node("Conv", ["images", "w0"], ["c0"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu"),
        helper.make_node("Reshape", ["r0", "shape"], ["rows"], "reshape"),
        helper.make_node("MatMul", ["rows", "m"], ["product"], "matmul"),
        helper.make_node("Gemm", ["rows", "g", "gb"], ["logits"], "gemm", transB=1),
        helper.make_node("Gemm", ["rows", "g"], ["boxes"], "gemm without bias", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "bare",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 20]) for name in ("product", "logits", "boxes")],
        [
            *(numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()),
            numpy_helper.from_array(np.array([64, CHANNELS]), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("target", [TENSORRT, CPU], ids=lambda d: d.name)
def test_a_convolution_or_gemm_without_a_bias_gets_one_and_a_bare_product_is_left_alone(rng, target: Target):
    model, images = bare(rng), brighter_images(rng, 1)
    plan = make_plan(GraphIndex(model), Policy("all"))
    amax = ranges(model, plan, images)
    before = insert_qdq(GraphIndex(model), plan, amax, target)
    found = shifts(model, before, plan, images)
    assert found.keys() == {"conv", "gemm", "gemm without bias"}
    after = insert_qdq(GraphIndex(model), plan, amax, target, found)
    added = {node.name for node in after.graph.node} - {node.name for node in before.graph.node}
    assert added == ({"conv.bias_DequantizeLinear"} if target.int32_bias else set())
    names = ["c0", "logits", "boxes"]
    exact, old, new = (run(graph, images[0], names) for graph in (model, before, after))
    for a, b, c in zip(exact, old, new):
        axes = (0, 2, 3) if a.ndim == 4 else 0
        shift = np.abs((a - b).mean(axis=axes)).max()
        assert np.abs((a - c).mean(axis=axes)).max() < 0.03 * shift


def test_the_mean_of_a_float_layer_comes_just_behind_it(case, monkeypatch, tmp_path):
    """So that its result can go: all of them together are far more than one image's."""
    model, images, plan, amax = case
    graph = GraphIndex(model)
    order = KernelOrder(monkeypatch, tmp_path)
    shifts(model, insert_qdq(graph, plan, amax, TENSORRT), plan, images[:1], parts=1)
    ran = [kind for kind, _ in order.of(0, {"Conv", "MatMul", "ReduceMean"})]
    assert ran == ["Conv", "ReduceMean"] * 3 + ["MatMul", "ReduceMean"]


def test_the_float_graph_runs_once_over_the_images_for_all_of_its_quantized_graphs(case):
    model, images, plan, amax = case
    passes = []
    correction = BiasCorrection(GraphIndex(model), plan.layers, lambda: passes.append(1) or images)
    graphs = [insert_qdq(GraphIndex(model), plan, amax, target) for target in (TENSORRT, CPU)]
    together = [correction.shifts(graph, plan, parts=2) for graph in graphs]
    assert len(passes) == 1 + 2 * 2
    for graph, found in zip(graphs, together):
        alone = shifts(model, graph, plan, images, parts=2)
        assert found.keys() == alone.keys() == set(LAYERS)
        for layer, shift in found.items():
            np.testing.assert_array_equal(shift, alone[layer])


def test_a_plan_with_fewer_layers_takes_the_means_that_were_found_for_all(case):
    model, images, plan, amax = case
    correction = BiasCorrection(GraphIndex(model), plan.layers, lambda: images)
    fewer = replace(plan, layers=plan.layers[1:3])
    graph = insert_qdq(GraphIndex(model), fewer, amax, TENSORRT)
    found, alone = correction.shifts(graph, fewer), shifts(model, graph, fewer, images)
    assert found.keys() == alone.keys() == {layer.node for layer in fewer.layers}
    for layer, shift in found.items():
        np.testing.assert_array_equal(shift, alone[layer])
    with pytest.raises(ValueError, match="2 layers are not among those"):
        BiasCorrection(GraphIndex(model), fewer.layers, lambda: images).shifts(graph, plan)
