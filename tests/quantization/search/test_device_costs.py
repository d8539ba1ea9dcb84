"""Costs from a device's profile, on layer tables in the inspector's form that are made from real graphs."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from inspected_engine import Reformat, inspected
from members import exported

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.groups import groups_of, macs
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantize import int8_graph
from edgedetr.quantization.quantized_tensors import quantized_tensors, tensors_to_observe
from edgedetr.quantization.search.conversions import elements_of
from edgedetr.quantization.search.costs import modelled_costs
from edgedetr.quantization.search.decisions import predicted_latency
from edgedetr.quantization.search.device_costs import OTHERWISE, device_costs
from edgedetr.quantization.search.search_report import Candidate, SearchReport
from edgedetr.quantization.target import TENSORRT
from edgedetr.runtime.tensorrt.layer_profile import EngineTimes, LayerProfile, layer_times


@pytest.fixture(scope="module")
def network():
    """The float graph as FP16 is made of it, its split form with its groups, and INT8 of all of them for TensorRT."""
    whole, policy = onnx.load(exported("rt_detr")), load_policy("default")
    graph = GraphIndex(split_concats(whole))
    groups = groups_of(graph, policy)
    plan = plan_for(graph, policy, Placement(tuple(group.id for group in groups)))
    int8 = int8_graph(graph, plan, dict.fromkeys(tensors_to_observe(graph, plan), 4.0), TENSORRT)
    quantized = {
        name: sorted({node for node, _ in tensor.consumers})
        for name, tensor in quantized_tensors(graph, plan, TENSORRT).items()
    }
    return whole, graph, groups, int8, quantized


def profile_of(whole, int8, *, reformats=(), version=10, metadata=True, rest=0.0) -> LayerProfile:
    """FP16 takes a millisecond for a million multiply-accumulates, INT8 a third of one; other layers take `rest`."""

    def engine(model, per_million, more=(), fused=True):
        graph = GraphIndex(model)
        weighted = ("Conv", "MatMul", "Gemm")

        def ms(node):
            return macs(node, graph) / 1e6 * per_million if node.op_type in weighted else rest

        text, times = inspected(model, ms, reformats=more, fused=fused, version=version, metadata=metadata)
        # Three runs: the median is the middle one, and one of them is disturbed.
        runs = [{name: time * factor for name, time in times.items()} for factor in (1.0, 1.0, 7.0)]
        return EngineTimes("model.onnx", "0" * 64, "strong", layer_times(text, runs))

    return LayerProfile(
        "Orin", 87, "10.3.0", "12.6", "", 3, engine(whole, 1.0, fused=False), engine(int8, 1 / 3, reformats)
    )


@pytest.fixture(scope="module")
def plain(network):
    whole, _, _, int8, _ = network
    return profile_of(whole, int8)


def handed_over(graph, groups, quantized) -> dict[tuple[str, str], str]:
    """{(group, group): tensor} that a convolution of the first writes through a Relu, and the second alone reads."""
    owner = {node: group.id for group in groups for node in group.nodes}
    found = {}
    for tensor, readers in quantized.items():
        relu = graph.producers.get(tensor)
        if relu is not None and relu.op_type == "Relu" and len(readers) == 1:
            first, second = owner.get(graph.producers[relu.input[0]].name), owner.get(readers[0])
            if None not in (first, second) and first != second:
                found[first, second] = tensor
    assert len(found) >= 3
    return found


def test_tensorrt_11_words_layers_in_another_way_and_means_the_same(network, plain):
    whole, _, _, int8, _ = network
    assert profile_of(whole, int8, version=11) == plain


def test_every_group_gets_the_time_of_its_own_layers(network, plain):
    """By another way: FP16 counts a convolution behind a Concat as a whole, INT8 branch by branch."""
    whole, graph, groups, _, quantized = network
    found = device_costs(graph, groups, quantized, plain)
    assert found.measured and set(found.groups) == {group.id for group in groups}
    assert any("/branch." in node for group in groups for node in group.nodes)
    unsplit = GraphIndex(whole)
    for group in groups:
        nodes = {node.partition("/branch.")[0] for node in group.nodes}
        cost = found.groups[group.id]
        assert cost.float_ms == pytest.approx(sum(macs(unsplit.node_by_name[node], unsplit) for node in nodes) / 1e6)
        assert cost.int8_ms == pytest.approx(group.macs / 3e6)
    assert "Orin with TensorRT 10.3.0" in found.source


def test_times_of_all_layers_are_counted_once(network):
    whole, graph, groups, int8, quantized = network
    profile = profile_of(whole, int8, rest=0.25)
    found = device_costs(graph, groups, quantized, profile)
    assert sum(cost.float_ms for cost in found.groups.values()) + found.rest_ms == pytest.approx(profile.float.ms)
    # An activation behind a convolution is the convolution's, whether the engine fuses it or not.
    first = next(group for group in groups if group.kind == "convolution")
    assert found.groups[first.id].float_ms == pytest.approx(first.macs / 1e6 + 0.25)


def test_a_reformat_is_its_groups_cost_in_int8_and_tells_what_an_edge_costs(network, plain):
    whole, graph, groups, int8, quantized = network
    convolutions = [group for group in groups if group.kind == "convolution" and len(group.nodes) == 1]
    line = [(4_000, 0.009), (400_000, 0.405)]  # 0.005 ms to start, a nanosecond for each element
    made = [
        (Reformat(group.nodes[0], f"t{n}", elements), ms)
        for n, (group, (elements, ms)) in enumerate(zip(convolutions, line))
    ]
    # A change of layout alone is a cost of the group, and says nothing of what a change of type takes.
    layout = convolutions[2]
    made.append((Reformat(layout.nodes[0], "t2", 4_000, "int8", "int8"), 3.0))
    without = device_costs(graph, groups, quantized, plain)
    found = device_costs(graph, groups, quantized, profile_of(whole, int8, reformats=made))
    for group, ms in zip(convolutions, (0.009, 0.405, 3.0)):
        assert found.groups[group.id].int8_ms == pytest.approx(without.groups[group.id].int8_ms + ms)
        assert found.groups[group.id].float_ms == without.groups[group.id].float_ms
    assert found.int8_conversion_ms == pytest.approx(3.414) and without.int8_conversion_ms == 0
    for costs, each in ((found, lambda n: 0.005 + 1e-6 * n), (without, OTHERWISE.of)):
        edges = {(edge.first, edge.second): edge.penalty for edge in costs.edges}
        for pair, tensor in handed_over(graph, groups, quantized).items():
            assert edges[pair] == pytest.approx(each(elements_of(graph, tensor)))


def test_a_tensor_that_is_converted_in_any_case_is_no_edge(network, plain):
    whole, graph, groups, int8, quantized = network
    before = device_costs(graph, groups, quantized, plain).edges
    pair, tensor = next(iter(handed_over(graph, groups, quantized).items()))
    made = [(Reformat(quantized[tensor][0], tensor, 4_000), 0.01)]
    after = device_costs(graph, groups, quantized, profile_of(whole, int8, reformats=made)).edges
    assert pair in {(edge.first, edge.second) for edge in before}
    assert pair not in {(edge.first, edge.second) for edge in after}


@pytest.mark.parametrize("measured", [True, False])
def test_a_report_says_what_latencies_rest_on_that_were_not_measured(network, plain, measured):
    _, graph, groups, _, quantized = network
    made = device_costs(graph, groups, quantized, plain)
    costs = made if measured else modelled_costs(graph, groups, quantized, "tensorrt")
    placement = Placement((groups[0].id,))
    slower = Candidate("policy", placement, 1.0, 0.0, **{**predicted_latency(placement, costs), "int8_ms": 1e3})
    report = SearchReport("tensorrt", 1.0, {}, "", 50.0, costs, {}, None, (slower,), outcome="float")
    assert slower.float_ms == (plain.float.ms if measured else 0)
    said = "predicted from a profile of Orin with TensorRT 10.3.0" if measured else "a model by multiply-accumulates"
    assert f"(latency is {said}" in report.sentence()


def test_a_group_without_layers_of_its_own_stays_float_and_is_said(network, plain, caplog):
    _, graph, groups, _, quantized = network
    lost = groups[3]
    kept = tuple(layer for layer in plain.int8.layers if not set(layer.nodes) & set(lost.nodes))
    found = device_costs(graph, groups, quantized, replace(plain, int8=replace(plain.int8, layers=kept)))
    assert found.groups[lost.id].gain_ms >= 0 and lost.id in caplog.text and "stay float" in caplog.text


def test_layers_that_name_no_nodes_are_refused(network):
    whole, graph, groups, int8, quantized = network
    with pytest.raises(
        ExportError, match=rf"of {len(groups)} groups of layers, 0 are named.*remove results/profile.json"
    ):
        device_costs(graph, groups, quantized, profile_of(whole, int8, metadata=False))
