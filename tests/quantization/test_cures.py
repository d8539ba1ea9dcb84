"""Graphs are cured of the faults that a library is known to have: bit for bit the same, and right in that library."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from members import exported, sample_images
from onnx import ModelProto, TensorProto, helper
from quantized_kernels import CONSTANTS, FLOOR_DB, GRAPHS, build, images_for

from edgedetr.artifacts import OPENVINO
from edgedetr.lint.lint import require_no_errors
from edgedetr.onnx_graph.graph_edit import prune
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization import cures, patterns
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.cures import cured, cured_plan, faults
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantize import int8_graph
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.search.workbench import TARGETS
from edgedetr.quantization.target import CPU, TENSORRT
from edgedetr.runtime.backends import base, onnxruntime
from edgedetr.runtime.sqnr import sqnr_db

FAULTY = {
    "openvino-concat": GRAPHS["Resize and Conv, Concat, pair, Conv"],
    "openvino-concat-moved": GRAPHS["Concat, pair, MaxPool, Conv"],
    "openvino-concat-of-pairs": (
        "QuantizeLinear images s i8 -> q",
        "DequantizeLinear q s i8 -> a",
        "QuantizeLinear images twice_s i8 -> q2",
        "DequantizeLinear q2 twice_s i8 -> e",
        "Concat a e -> c | axis=1",
        "DequantizeLinear wide w_s w_z -> wd | axis=0",
        "Conv c wd -> y",
    ),
}
CONSTANTS["twice_s"] = CONSTANTS["s"] * np.float32(2)


def computed(model: ModelProto, images: np.ndarray) -> np.ndarray:
    """The reference run of the first output."""
    name = model.graph.output[0].name
    return onnxruntime.tensors(model.SerializeToString(), images, [name], optimize=False)[name]


def openvino_db(model: ModelProto, images: np.ndarray) -> float:
    """SQNR of OpenVINO's first output from the reference run of the same graph."""
    if reason := base.get(OPENVINO).unavailable():
        pytest.skip(reason)
    read, name = base.get(OPENVINO).tensors, model.graph.output[0].name
    assert read is not None
    return sqnr_db(computed(model, images), read(model.SerializeToString(), images, [name])[name])


@pytest.mark.parametrize("name", FAULTY)
def test_openvino_computes_the_cured_graph_as_it_is_written(name: str) -> None:
    model = build(FAULTY[name])
    images, layer = images_for(model), model.graph.node[-1].name
    found = cured(model, [OPENVINO])
    assert [(cure.pattern, cure.layer, cure.reason) for cure in found.cures] == [(name, layer, "")]
    assert faults(found.model, OPENVINO) == [] and cured(found.model, [OPENVINO]).cures == ()
    assert openvino_db(model, images) < FLOOR_DB < openvino_db(found.model, images)
    graph = GraphIndex(found.model)
    assert graph.node_by_name[layer].op_type == "Conv" and graph.dequantizer(graph.node_by_name[layer], 1)
    before, after = computed(model, images), computed(found.model, images)
    if name == "openvino-concat-of-pairs":
        # The first 16 channels are rounded to twice the step: they move by half of both steps at most, and what the
        # convolution makes of it is at most the sum of its weights' magnitudes times that.
        weights = np.abs(CONSTANTS["wide"][:, :16, 0, 0]).sum(1) * CONSTANTS["w_s"]
        bound = weights * float(CONSTANTS["s"] + CONSTANTS["twice_s"]) / 2
        moved = np.abs(after - before).max(axis=(0, 2, 3))
        assert (0 < moved).all() and (moved <= bound + 1e-4).all()
    else:
        np.testing.assert_array_equal(before, after)


def test_a_graph_with_zero_point_128_needs_no_cure() -> None:
    assert cured(build(GRAPHS["Concat, pair, Conv, uint8"]), [OPENVINO]).cures == ()


# ---------------------------------------------------------------------------------------- what a search can place


def quantized_projector(member: str, backends: list[str]) -> tuple[ModelProto, ModelProto, cures.CuredPlan]:
    """A placement of the projector alone, as export writes it for TensorRT without and with cures."""
    model, policy = split_concats(onnx.load(exported(member))), load_policy("default")
    graph = GraphIndex(model)
    projector = tuple(group.id for group in groups_of(graph, policy) if group.role == "projector")
    plan = plan_for(graph, policy, Placement(projector))
    tensors = tensors_to_observe(graph, plan)
    values = GraphSession(model, tensors).run({"images": sample_images(1).numpy()})
    amax = {name: float(np.abs(value).max()) for name, value in values.items()}
    chosen = cured_plan(graph, plan, amax, TENSORRT, backends)
    return tuple(int8_graph(graph, chosen.plan, amax, TENSORRT, None, c) for c in ((), backends)) + (chosen,)


def until(model: ModelProto, tensor: str) -> ModelProto:
    """The part of a graph that makes one tensor."""
    part = ModelProto.FromString(model.SerializeToString())
    del part.graph.output[:]
    part.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    prune(part)
    return part


@pytest.mark.parametrize("member", ["lw_detr", "rf_detr"])
def test_a_placement_of_the_projector_is_right_in_openvino(member: str) -> None:
    before, after, chosen = quantized_projector(member, [OPENVINO])
    layers = [layer for layer, _ in faults(before, OPENVINO)]
    assert layers and [cure.layer for cure in chosen.cures] == layers
    assert faults(after, OPENVINO) == []
    assert {layer.node for layer in chosen.plan.layers} >= set(layers)  # they stay INT8
    require_no_errors(after, "the cured graph")
    if member == "rf_detr":  # the other is enough to run
        return
    images, tensor = sample_images(1).numpy(), GraphIndex(after).node_by_name[layers[0]].output[0]
    faulty, right = until(before, tensor), until(after, tensor)
    np.testing.assert_array_equal(computed(faulty, images), computed(right, images))
    assert openvino_db(faulty, images) < FLOOR_DB < openvino_db(right, images)


def test_no_known_pattern_can_be_in_the_graphs_that_a_search_evaluates() -> None:
    """Else the search would have to cure them, as export does."""
    for target in TARGETS.values():
        dialect = CPU if target.artifact is CPU.artifact else TENSORRT
        assert not cures.concerns(dialect, target.name)


# ------------------------------------------------------------------------------------------------- float fallbacks


def test_where_no_edit_is_possible_the_layer_stays_float(monkeypatch) -> None:
    model, policy = split_concats(onnx.load(exported("rt_detr"))), load_policy("default")
    graph = GraphIndex(model)
    plan = plan_for(graph, policy, None)
    amax = dict.fromkeys(tensors_to_observe(graph, plan), 4.0)
    known = patterns.patterns()[0]
    chain = "Relu", "QuantizeLinear", "DequantizeLinear", "Conv"  # Q does not commute with Relu
    step = patterns.Step("move-before", 1)
    planted = replace(
        known, name="planted", kind="backend", backends=("x",), chain=chain, at=3, rewritten=False, steps=(step,)
    )
    for module in (patterns, cures):
        monkeypatch.setattr(module, "patterns", lambda: (planted,))
    found = cured_plan(graph, plan, amax, TENSORRT, ["x", "y"])
    behind_relu = {
        layer.node
        for layer in plan.layers
        if layer.op == "Conv" and layer.data in graph.producers and graph.producers[layer.data].op_type == "Relu"
    }
    fallbacks = {cure.layer for cure in found.cures}
    assert fallbacks == behind_relu != set()
    assert {layer.node for layer in plan.layers} - {layer.node for layer in found.plan.layers} == behind_relu
    assert all("no other cure is possible" in found.plan.float_layers[name] for name in behind_relu)
    kept = {layer.node for layer in found.plan.layers}
    assert all(sum_.node in {one.node for one in plan.residuals} for sum_ in found.plan.residuals)
    assert kept and {cure.how for cure in found.cures} == {"a float fallback"}
    assert cured_plan(graph, plan, amax, TENSORRT, ["y"]).plan is plan
