"""The simulation rounds where a GPU rounds; CPU libraries do not, which is why it exists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.errors import BundleError
from edgedetr.onnx_graph.fp16_simulation import MOVES, simulate_fp16
from edgedetr.runtime.backends import onnxruntime, openvino

FP16 = TensorProto.FLOAT16


def graph(nodes: list[onnx.NodeProto], shape: tuple[int, ...], **constants: np.ndarray) -> ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def saved(model: ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def overflow() -> ModelProto:
    """images * 300 * 1e-3, in FP16."""
    return graph(
        [
            helper.make_node("Cast", ["images"], ["x"], "to_half", to=FP16),
            helper.make_node("Mul", ["x", "large"], ["product"], "product"),
            helper.make_node("Mul", ["product", "small"], ["y"], "scaled"),
            helper.make_node("Cast", ["y"], ["logits"], "to_float", to=TensorProto.FLOAT),
        ],
        (1, 4),
        large=np.array(300, np.float16),
        small=np.array(1e-3, np.float16),
    )


def run(model: bytes, images: np.ndarray, optimize: bool = False) -> np.ndarray:
    return onnxruntime.tensors(model, images, ["logits"], optimize=optimize)["logits"]


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "optimized"])
def test_an_overflow_is_infinite_in_the_simulation_and_hidden_in_the_graph_itself(optimize, tmp_path):
    path, images = saved(overflow(), tmp_path), np.full((1, 4), 300, np.float32)
    with np.errstate(over="ignore"):
        expected = np.float16(300) * np.float16(300) * np.float16(1e-3)
    assert np.isinf(expected)
    assert np.isinf(run(simulate_fp16(path), images)).all()
    # 90 in exact arithmetic; ONNX Runtime keeps the product in float32 between the two nodes.
    np.testing.assert_allclose(run(path.read_bytes(), images, optimize), 90, rtol=2e-3)  # 1e-3 in FP16 is 1.0004e-3
    np.testing.assert_allclose(run(simulate_fp16(path, rounded=False), images, optimize), 90, rtol=2e-3)


def test_openvino_takes_the_pairs_out_so_it_must_not_score_fp16(tmp_path):
    found = openvino.tensors(simulate_fp16(saved(overflow(), tmp_path)), np.full((1, 4), 300, np.float32), ["logits"])
    assert np.isfinite(found["logits"]).all()


def test_every_value_is_what_numpy_computes_in_float16(tmp_path, rng):
    """One rounding per operation, also in the weights: numpy's float16 arithmetic is the reference."""
    weight, bias = rng.normal(size=4).astype(np.float16), rng.normal(size=4).astype(np.float16)
    path = saved(
        graph(
            [
                helper.make_node("Cast", ["images"], ["x"], "to_half", to=FP16),
                helper.make_node("Mul", ["x", "w"], ["m"], "mul"),
                helper.make_node("Relu", ["m"], ["r"], "relu"),
                helper.make_node("Add", ["r", "b"], ["a"], "add"),
                helper.make_node("Sqrt", ["r"], ["s"], "sqrt"),
                helper.make_node("Sub", ["a", "s"], ["d"], "sub"),
                helper.make_node("Cast", ["d"], ["logits"], "to_float", to=TensorProto.FLOAT),
            ],
            (50, 4),
            w=weight,
            b=bias,
        ),
        tmp_path,
    )
    images = rng.normal(0, 10, (50, 4)).astype(np.float32)
    relu = np.maximum(images.astype(np.float16) * weight, np.float16(0))
    expected = (relu + bias) - np.sqrt(relu)
    assert expected.dtype == np.float16
    np.testing.assert_array_equal(run(simulate_fp16(path), images), expected.astype(np.float32))
    assert np.abs(run(simulate_fp16(path, rounded=False), images) - expected).max() > 1e-4  # without the pairs


def test_small_numbers_are_lost_as_on_a_gpu(tmp_path):
    path = saved(
        graph(
            [
                helper.make_node("Cast", ["images"], ["x"], "to_half", to=FP16),
                helper.make_node("Cast", ["x"], ["logits"], "to_float", to=TensorProto.FLOAT),
            ],
            (1, 3),
        ),
        tmp_path,
    )
    np.testing.assert_array_equal(
        run(simulate_fp16(path), np.array([[2e-8, 70000, 2049]], np.float32)), [[0, np.inf, 2048]]
    )


def test_integers_are_not_rounded_again_behind_a_pair_of_int8(tmp_path):
    """Integer kernels read the integers: 101 * 0.01 would be 1.0098 in FP16."""
    scale, zero = np.array(0.01, np.float16), np.array(0, np.int8)
    path = saved(
        graph(
            [
                helper.make_node("Cast", ["images"], ["x"], "to_half", to=FP16),
                helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
                helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "d"),
                helper.make_node("Cast", ["d"], ["logits"], "to_float", to=TensorProto.FLOAT),
            ],
            (1, 2),
            scale=scale,
            zero=zero,
        ),
        tmp_path,
    )
    found = run(simulate_fp16(path), np.array([[1.011, -0.5]], np.float32))
    np.testing.assert_array_equal(found, np.array([[101, -50]], np.float32) * scale.astype(np.float32))


def test_operators_that_only_move_values_get_no_pair(tmp_path):
    path = saved(
        graph(
            [
                helper.make_node("Cast", ["images"], ["x"], "to_half", to=FP16),
                helper.make_node("Transpose", ["x"], ["t"], "turn"),
                helper.make_node("Exp", ["t"], ["e"], "exp"),
                helper.make_node("Cast", ["e"], ["logits"], "to_float", to=TensorProto.FLOAT),
            ],
            (2, 3),
        ),
        tmp_path,
    )
    pairs = [node.name for node in onnx.load_from_string(simulate_fp16(path)).graph.node if node.name.endswith("_pair")]
    assert sorted(pairs) == ["e_pair", "e_rounded_pair", "x_pair", "x_rounded_pair"]
    assert not MOVES & {"Add", "Mul", "MatMul", "Conv", "Softmax", "Sigmoid", "LayerNormalization", "AveragePool"}


def test_a_graph_without_fp16_comes_back_unchanged(tmp_path):
    path = saved(graph([helper.make_node("Relu", ["images"], ["logits"], "relu")], (1, 2)), tmp_path)
    assert onnx.load_from_string(simulate_fp16(path)) == onnx.load(str(path))


def test_what_is_no_onnx_is_one_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protobuf at all")
    with pytest.raises(BundleError, match="not an ONNX file.*written by edgedetr export"):
        simulate_fp16(path)
