"""Placements: from groups to a plan and a graph, and the file that holds one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import ModelProto
from tiny_network import network, run

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.placement import Placement, RangesByObserver, plan_for, quantized_model
from edgedetr.quantization.policy import Policy, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.target import CPU, TENSORRT

POLICY = Policy("all")


@pytest.fixture
def case(rng):
    model = network(rng, True)
    images = rng.uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    graph = GraphIndex(model)
    names = tensors_to_observe(graph, make_plan(graph, POLICY))
    values = dict(zip(names, run(model, images, names)))
    largest = {name: float(np.abs(value).max()) for name, value in values.items()}
    ranges = {"minmax": largest, "half": {name: value / 2 for name, value in largest.items()}}
    return model, graph, images, RangesByObserver("minmax", ranges)


def quantizers(model: ModelProto) -> list[str]:
    return [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("target", [TENSORRT, CPU], ids=["tensorrt", "cpu"])
def test_without_a_group_the_model_is_the_float_model(case, target):
    model, graph, images, ranges = case
    found = quantized_model(graph, POLICY, Placement(()), ranges, target)
    assert quantizers(found) == []
    for ours, theirs in zip(run(found, images), run(model, images)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("target", [TENSORRT, CPU], ids=["tensorrt", "cpu"])
def test_the_policys_own_placement_gives_the_graph_of_the_policy(case, target):
    _, graph, _, ranges = case
    same = Placement.of_policy(groups_of(graph, POLICY))
    amax = share_pool_ranges(graph.model, ranges.amax["minmax"])
    expected = insert_qdq(graph, make_plan(graph, POLICY), amax, target)
    for placement in (same, None):
        assert quantized_model(graph, POLICY, placement, ranges, target) == expected


def test_one_group_quantizes_its_own_nodes_alone(case):
    _, graph, _, ranges = case
    for group in groups_of(graph, POLICY):
        plan = plan_for(graph, POLICY, Placement((group.id,)))
        assert tuple(layer.node for layer in plan.layers) == group.nodes
        found = quantized_model(graph, POLICY, Placement((group.id,)), ranges, TENSORRT)
        reading = {node.name for node in found.graph.node if any(i.endswith("_dequantized") for i in node.input)}
        assert reading - {"pool"} <= {*group.nodes, "add"}


def test_an_observer_decides_the_ranges_of_the_tensors_its_group_reads(case):
    _, graph, _, ranges = case
    groups = groups_of(graph, POLICY)
    chosen = Placement.of_policy(groups)
    last = groups[-1]
    other = Placement(chosen.int8, {last.id: "half"})
    scales = [
        {item.name: item for item in quantized_model(graph, POLICY, one, ranges, CPU).graph.initializer}
        for one in (chosen, other)
    ]
    changed = {name for name in scales[0] if name.endswith("_scale") and scales[0][name] != scales[1][name]}
    read = graph.node_by_name[last.nodes[0]].input[0]
    assert f"{read}_scale" in changed
    assert all(name.startswith(read) or last.id in name for name in changed)


def test_an_unknown_group_and_an_unknown_observer_are_named(case):
    _, graph, _, ranges = case
    name = groups_of(graph, POLICY)[0].id
    with pytest.raises(ExportError, match=rf"no such group; did you mean '{name}'"):
        plan_for(graph, POLICY, Placement((name + "x",)))
    with pytest.raises(ExportError, match="no ranges of observer 'entropy'; expected one of half, minmax"):
        quantized_model(graph, POLICY, Placement((name,), {name: "entropy"}), ranges, CPU)


def test_smoothing_outside_an_export_is_refused_and_not_ignored(case):
    _, graph, _, ranges = case
    name = groups_of(graph, POLICY)[0].id
    with pytest.raises(ExportError, match="only an export smooths"):
        quantized_model(graph, POLICY, Placement((name,), smooth={name: 0.5}), ranges, CPU)


def test_a_placement_is_read_back_and_its_digest_depends_on_its_values(tmp_path):
    placement = Placement(("b", "a"), {"a": "entropy"}, {"b": 0.5})
    placement.save(tmp_path / "p.json")
    again = Placement.load(tmp_path / "p.json")
    assert (set(again.int8), again.observers, again.smooth) == ({"a", "b"}, {"a": "entropy"}, {"b": 0.5})
    assert again.sha256() == placement.sha256() == Placement(("a", "b"), {"a": "entropy"}, {"b": 0.5}).sha256()
    assert placement.sha256() != Placement(("a", "b"), {"a": "mse"}, {"b": 0.5}).sha256()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": 2}, "schema is 2, this version reads 1"),
        ({"int8": "a"}, "int8 is no list"),
        ({"observers": {"a": 3}}, "observers is no object of labels"),
        ({"smooth": {"a": 2}}, "smooth holds 2; expected numbers from 0 to 1"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_a_damaged_placement_is_refused_with_its_fault(tmp_path, change, message):
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"schema": 1, "int8": [], "observers": {}, "smooth": {}, **change}))
    with pytest.raises(ExportError, match=message):
        Placement.load(path)
