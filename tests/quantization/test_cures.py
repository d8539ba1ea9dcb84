"""Graphs are cured of the faults that a library is known to have: bit for bit the same, and right in that library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from members import exported, sample_images, variant
from onnx import ModelProto, TensorProto, helper
from quantized_kernels import CONSTANTS, FLOOR_DB, GRAPHS, build, images_for

from edgedetr.artifacts import OPENVINO
from edgedetr.evaluation.first_divergence import find_sharp_divergence
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
    "openvino-average-padding": GRAPHS["AveragePool that counts its zeros, uint8"],
    "openvino-average-behind-pad": GRAPHS["Pad, AveragePool, uint8"],
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
    node = GraphIndex(found.model).node_by_name[layer]
    assert node.op_type == "AveragePool" or GraphIndex(found.model).dequantizer(node, 1)  # the layer is still INT8
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


RIGHT = (
    "Concat, pair, Conv, uint8",
    "AveragePool that counts its zeros, int8",
    "AveragePool that leaves its padding out, uint8",
    "Pad, pair, AveragePool, uint8",
    "Pad, MaxPool, uint8",
)


@pytest.mark.parametrize("form", RIGHT)
def test_a_form_that_is_computed_rightly_needs_no_cure(form: str) -> None:
    assert cured(build(GRAPHS[form]), [OPENVINO]).cures == ()


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


LITE = variant("deimv2", lite=True, levels=2, points=(4, 2))  # means of 3 x 3 cells, with zeros around the map


def test_deimv2_of_the_smallest_sizes_is_cured_in_the_graph_for_a_cpu(tmp_path: Path) -> None:
    model, policy = split_concats(onnx.load(exported(LITE))), load_policy("default")
    graph = GraphIndex(model)
    plan = plan_for(graph, policy, None)
    tensors = tensors_to_observe(graph, plan)
    images = sample_images(1).numpy()
    amax = {name: float(np.abs(v).max()) for name, v in GraphSession(model, tensors).run({"images": images}).items()}
    assert cured_plan(graph, plan, amax, TENSORRT, [OPENVINO]).cures == ()  # its zero points are 0
    chosen = cured_plan(graph, plan, amax, CPU, [OPENVINO])
    assert {(cure.pattern, cure.reason) for cure in chosen.cures} == {("openvino-average-padding", "")}
    before, after = (int8_graph(graph, chosen.plan, amax, CPU, None, backends) for backends in ((), (OPENVINO,)))
    layer = chosen.cures[0].layer
    tensor = GraphIndex(after).node_by_name[layer].output[0]
    faulty, right = until(before, tensor), until(after, tensor)
    np.testing.assert_array_equal(computed(faulty, images), computed(right, images))
    onnx.save(before, str(tmp_path / "before.onnx"))
    found = find_sharp_divergence(tmp_path / "before.onnx", OPENVINO, images)
    assert found is not None and found.node == layer  # and no layer behind it
    assert openvino_db(faulty, images) < FLOOR_DB < openvino_db(right, images)


def test_no_known_pattern_in_the_graphs_that_a_search_evaluates_is_cured_by_a_float_fallback() -> None:
    """It would change what a candidate's groups mean; edits change no group."""
    for target in TARGETS.values():
        dialect = CPU if target.artifact is CPU.artifact else TENSORRT
        backends = target.artifact.verified if dialect is CPU else (target.name,)  # what export cures for by default
        for pattern in patterns.patterns():
            possible = not (pattern.signed if dialect.uint8 else pattern.asymmetric) and {*backends} & {
                *pattern.backends
            }
            assert not possible or pattern.steps or not pattern.curable


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
