"""Graphs of opset 20 to 23 go down to opset 19 with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from external_models import open_session
from graphs import graph_of, run_model
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.opset import convert_opset


def one_node(op: str, values: list[np.ndarray | None], opset: int, **attributes) -> ModelProto:
    """One node whose first input is the graph's, and the others constants."""
    names = ["x", *(f"c{i}" if value is not None else "" for i, value in enumerate(values[1:]))]
    constants = [numpy_helper.from_array(value, name) for value, name in zip(values[1:], names[1:]) if name]
    node = helper.make_node(op, names, ["y"], "the_node", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values[0].shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


ANGLES = np.random.default_rng(1).uniform(0, 6, (2, 5, 4)).astype(np.float32)
FORMS = {
    "gelu": ("Gelu", [floats(2, 7)], 20, {}),
    "gelu by tanh": ("Gelu", [floats(2, 7)], 20, {"approximate": "tanh"}),
    "group norm": (
        "GroupNormalization",
        [floats(2, 6, 3, 5), floats(6), floats(6) + 1],
        21,
        {"num_groups": 3, "epsilon": 1e-3},
    ),
    "rms norm": ("RMSNormalization", [floats(2, 5, 8), floats(8)], 23, {"epsilon": 1e-4}),
    "rms norm over two axes": ("RMSNormalization", [floats(2, 5, 8), floats(5, 8)], 23, {"axis": 1}),
    "attention": ("Attention", [floats(1, 2, 5, 4), floats(1, 2, 7, 4), floats(1, 2, 7, 6)], 23, {}),
    "attention of joined heads": (
        "Attention",
        [floats(2, 5, 8), floats(2, 7, 8), floats(2, 7, 8)],
        23,
        {"q_num_heads": 2, "kv_num_heads": 2},
    ),
    "attention with a scale": (
        "Attention",
        [floats(1, 2, 5, 4), floats(1, 2, 7, 4), floats(1, 2, 7, 4)],
        23,
        {"scale": 0.3},
    ),
    "attention with a mask": (
        "Attention",
        [floats(1, 2, 5, 4), floats(1, 2, 7, 4), floats(1, 2, 7, 4), floats(5, 7)],
        23,
        {},
    ),
    "attention with a mask of bits": (
        "Attention",
        [floats(1, 2, 5, 4), floats(1, 2, 7, 4), floats(1, 2, 7, 4), np.arange(35).reshape(1, 1, 5, 7) % 3 > 0],
        23,
        {},
    ),
    "rotary": ("RotaryEmbedding", [floats(2, 3, 5, 8), np.cos(ANGLES), np.sin(ANGLES)], 23, {}),
    "rotary of pairs": (
        "RotaryEmbedding",
        [floats(2, 3, 5, 8), np.cos(ANGLES), np.sin(ANGLES)],
        23,
        {"interleaved": 1},
    ),
    "rotary of a part": (
        "RotaryEmbedding",
        [floats(2, 3, 5, 8), np.cos(ANGLES[..., :2]), np.sin(ANGLES[..., :2])],
        23,
        {"rotary_embedding_dim": 4},
    ),
    "rotary of joined heads by place": (
        "RotaryEmbedding",
        [floats(2, 5, 24), np.cos(ANGLES[0]), np.sin(ANGLES[0]), np.array([[0, 1, 2, 3, 4], [4, 2, 1, 0, 3]])],
        23,
        {"num_heads": 3},
    ),
    "layer norm": ("LayerNormalization", [floats(2, 5, 8), floats(8), floats(8)], 23, {}),
    "grid sample": ("GridSample", [floats(1, 4, 6, 6), floats(1, 3, 5, 2)], 22, {"mode": "linear"}),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_an_operator_gives_the_same_numbers_at_opset_19(form):
    op, values, opset, attributes = FORMS[form]
    model = one_node(op, values, opset, **attributes)
    expected = open_session(model.SerializeToString()).run(None, {"x": values[0]})[0]
    lower = convert_opset(model, 19)
    assert (lower.ir_version, lower.opset_import[0].version) == (9, 19)
    actual = open_session(lower.SerializeToString()).run(None, {"x": values[0]})[0]
    # float32 in another order of summation, on values around 1; measured 5e-7
    np.testing.assert_allclose(actual, expected, atol=3e-6)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "op, values, attributes, message",
    [
        ("Attention", [floats(1, 2, 5, 4)] * 3, {"is_causal": 1}, "Attention the_node uses 'is_causal'"),
        (
            "Attention",
            [floats(1, 4, 5, 4), floats(1, 2, 5, 4), floats(1, 2, 5, 4)],
            {},
            "4 heads of queries for 2 of keys",
        ),
        (
            "AffineGrid",
            [floats(1, 2, 3), np.array([1, 3, 4, 4])],
            {},
            "AffineGrid the_node of opset 23 does not exist at",
        ),
    ],
)
def test_what_cannot_be_written_at_opset_19_is_named(op, values, attributes, message):
    with pytest.raises(ExportError, match=message):
        convert_opset(one_node(op, values, 23, **attributes), 19)


@pytest.mark.parametrize("mode, older", [("linear", b"bilinear"), ("cubic", b"bicubic"), ("nearest", b"nearest")])
def test_the_modes_of_grid_sample_are_renamed_on_the_way_down(mode, older, rng):
    grid = rng.uniform(-1.1, 1.1, (1, 3, 5, 2))
    model = graph_of([helper.make_node("GridSample", ["x", "g"], ["y"], "s", mode=mode)], {"g": grid}, opset=20)
    model.ir_version = 9
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    expected = run_model(model, x=image)[0]
    lower = convert_opset(model, 19)
    assert lower.graph.node[0].attribute[0].s == older
    assert (lower.ir_version, lower.opset_import[0].version) == (9, 19)
    np.testing.assert_array_equal(run_model(lower, x=image)[0], expected)


def test_an_older_file_is_converted_upwards(rng):
    model = graph_of([helper.make_node("ReduceMean", ["x"], ["y"], "mean", axes=[2, 3])], {}, opset=13)
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    lifted = convert_opset(model, 19)
    assert lifted.opset_import[0].version == 19
    np.testing.assert_array_equal(run_model(lifted, x=image)[0], run_model(model, x=image)[0])
