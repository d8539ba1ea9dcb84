"""Q and DQ move across nodes without a changed bit; one scale for the inputs of a Concat costs its rounding."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto
from quantized_kernels import CONSTANTS, build, images_for

from edgedetr.errors import ExportError
from edgedetr.quantization.qdq_moves import moved_before, moved_behind, quantized_padding, shared_scale
from edgedetr.runtime.backends import onnxruntime

# Nodes that join or move elements, or take the largest, from "a" (and "e") to "c".
NODES = {
    "Concat": "Concat a e -> c | axis=1",
    "Transpose": "Transpose a -> c | perm=0,2,3,1",
    "Reshape": "Reshape a rows -> c",
    "Slice": "Slice a begin end -> c",
    "MaxPool": "MaxPool a -> c | kernel_shape=3,3 pads=1,1,1,1 strides=2,2",
}
CONSTANTS.update(
    begin=np.array([0, 3, 1, 0]),
    end=np.array([1, 9, 16, 7]),
    s_large=CONSTANTS["s"] * np.float32(3),
    minus_half=np.asarray(np.float32(-0.5)),
)


def computed(model: ModelProto) -> np.ndarray:
    return onnxruntime.tensors(model.SerializeToString(), images_for(model), ["y"], optimize=False)["y"]


def order(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def same(first: ModelProto, *others: ModelProto) -> None:
    expected = computed(first)
    assert np.abs(expected).max() > 0.1
    for other in others:
        np.testing.assert_array_equal(computed(other), expected)


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("zero", ["i8", "mid"])
def test_a_pair_moves_across_a_node_in_both_directions_without_a_changed_bit(kind: str, zero: str) -> None:
    start = "Mul images one -> a", "Mul images minus_half -> e"
    lines = (*start, NODES[kind], f"QuantizeLinear c s {zero} -> q", f"DequantizeLinear q s {zero} -> y")
    behind = build(lines)
    between = moved_before(behind, "q")  # the node passes integers
    before = moved_before(between, "y")  # the whole pair stands in front of it
    inputs = 2 if kind == "Concat" else 1
    assert order(between)[-inputs - 2 :] == ["QuantizeLinear"] * inputs + [kind, "DequantizeLinear"]
    assert order(before)[-1] == kind and order(before).count("DequantizeLinear") == inputs
    back = moved_behind(before, "y")
    assert order(back) == order(between)
    again = moved_behind(back, "y/" + kind)
    assert order(again)[-3:] == [kind, "QuantizeLinear", "DequantizeLinear"]
    same(behind, between, before, back, again)


def test_a_node_that_others_read_too_stays_for_them() -> None:
    lines = "Concat images images -> c | axis=1", "QuantizeLinear c s i8 -> q", "DequantizeLinear q s i8 -> d"
    model = build((*lines, "Add c d -> y"))
    moved = moved_before(model, "q")
    assert order(moved).count("Concat") == 2
    same(model, moved)


def test_one_scale_moves_a_value_by_half_of_both_steps_at_most() -> None:
    pairs = []
    for name, scale in (("small", "s"), ("large", "s_large")):
        pairs += [f"QuantizeLinear images {scale} i8 -> {name}_q", f"DequantizeLinear {name}_q {scale} i8 -> {name}"]
    model = build((*pairs, "Concat small large -> c | axis=1", "Concat c small -> y | axis=1"))
    shared = shared_scale(model, "c")
    before, after = np.split(computed(model), 3, axis=1), np.split(computed(shared), 3, axis=1)
    steps = [float(CONSTANTS[name]) for name in ("s", "s_large")]
    moved = np.abs(after[0] - before[0])
    assert 0 < moved.max() <= sum(steps) / 2 + 1e-6
    # Levels of the larger scale, as the quantization of the same images with it alone.
    np.testing.assert_array_equal(after[0], after[1])
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[2], before[2])  # another reader of the first branch keeps its scale
    # Now the Concat can pass integers.
    passing = moved_behind(shared, "c")
    same(shared, passing)
    with pytest.raises(ExportError, match="several scales"):
        moved_behind(model, "c")


@pytest.mark.parametrize(
    "lines, words",
    [
        (("Sigmoid images -> c", "QuantizeLinear c s i8 -> y"), "cannot move across"),
        (("QuantizeLinear images s i8 -> y",), "reads no node"),
        (("Concat images images -> c | axis=1", "QuantizeLinear c b_s b_z -> y | axis=1"), "one constant scale"),
    ],
)
def test_what_does_not_commute_is_refused_with_the_reason(lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        moved_before(build(lines), "y")


def test_inputs_of_which_one_has_no_pair_cannot_share_a_scale() -> None:
    lines = "QuantizeLinear images s i8 -> q", "DequantizeLinear q s i8 -> d", "Concat d images -> y | axis=1"
    for move in (shared_scale, moved_behind):
        with pytest.raises(ExportError, match="no Q/DQ pair of its own|not all quantized"):
            move(build(lines), "y")


AVERAGES = {
    "its own padding": ("AveragePool d -> y | kernel_shape=3,3 strides=2,2 pads=1,0,2,1 count_include_pad=1",),
    "a Pad": ("Pad d around -> c", "AveragePool c -> y | kernel_shape=3,3 strides=2,2"),
}


@pytest.mark.parametrize("lines", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("zero", ["i8", "mid"])
def test_zeros_around_an_average_are_quantized_without_a_changed_bit(lines: tuple[str, ...], zero: str) -> None:
    model = build((f"QuantizeLinear images s {zero} -> q", f"DequantizeLinear q s {zero} -> d", *lines))
    changed = quantized_padding(model, "y")
    assert order(changed)[2:] == ["Pad", "QuantizeLinear", "DequantizeLinear", "AveragePool"]
    same(model, changed)


@pytest.mark.parametrize(
    "lines, words",
    [
        (("AveragePool images -> y | kernel_shape=3,3 pads=1,1,1,1 count_include_pad=1",), "behind a DQ"),
        (
            (
                "QuantizeLinear images s mid -> q",
                "DequantizeLinear q s mid -> d",
                "AveragePool d -> y | kernel_shape=3,3 strides=2,2 pads=1,1,1,1 count_include_pad=1 ceil_mode=1",
            ),
            "whole windows",
        ),
    ],
)
def test_a_padding_that_cannot_be_quantized_is_refused(lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        quantized_padding(build(lines), "y")
