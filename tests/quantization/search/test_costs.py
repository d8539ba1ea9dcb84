"""Measured costs: every kernel's time goes to one group or to none, on each library that runs here."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from members import HEIGHT, WIDTH, exported

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.groups import floor_of, groups_of
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantize import int8_graph
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.search import costs as costing
from edgedetr.quantization.search.conversions import ConversionTime
from edgedetr.quantization.search.costs import Costs, GroupCost, measured_costs
from edgedetr.quantization.search.front import Edge, placement_cost, solve
from edgedetr.quantization.search.kernel_times import KernelTime
from edgedetr.quantization.search.owners import owner_of, shares_of
from edgedetr.quantization.target import CPU


@pytest.fixture(scope="module")
def network():
    """The float graph of the smallest rt_detr, its groups, and the graph with all of them in INT8."""
    model, policy = split_concats(onnx.load(exported("rt_detr"))), load_policy("default")
    graph = GraphIndex(model)
    groups = groups_of(graph, policy)
    plan = plan_for(graph, policy, Placement(tuple(group.id for group in groups)))
    int8 = int8_graph(graph, plan, dict.fromkeys(tensors_to_observe(graph, plan), 4.0), CPU)
    return graph, groups, model.SerializeToString(), int8.SerializeToString()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_group_has_a_time_and_the_times_sum_to_the_whole(network, backend):
    pytest.importorskip(backend)
    graph, groups, floats, int8 = network
    images = np.random.default_rng(0).uniform(0, 255, (1, 3, HEIGHT, WIDTH)).astype(np.float32)
    found = measured_costs(graph, groups, floats, int8, {}, backend, images, threads=1, rounds=20)
    assert found.measured and set(found.groups) == {group.id for group in groups}
    timed = [name for name, cost in found.groups.items() if cost.float_ms > 0 and cost.int8_ms > 0]
    assert len(timed) >= 0.9 * len(groups)  # a product of a few microseconds may be shown as 0
    assert all(found.groups[group.id].float_ms > 0 for group in groups if group.kind == "convolution")
    assert sum(cost.float_ms for cost in found.groups.values()) + found.rest_ms == pytest.approx(found.float_ms)
    assert Costs.from_json(found.to_json()) == found


def test_a_kernel_belongs_to_the_group_it_is_named_after_or_follows(network):
    graph, groups, *_ = network
    owner = owner_of(graph, groups)
    conv = next(group for group in groups if group.kind == "convolution")
    tensor = graph.node_by_name[conv.nodes[0]].output[0]
    assert owner(conv.nodes[0]) == owner(f"{tensor}_QuantizeLinear") == owner(tensor) == conv.id
    assert owner(f"{conv.nodes[0]}/MatMulAddFusion") == conv.id
    assert owner(graph.after_relu(tensor)) == conv.id
    assert owner("nothing of this graph") == ""
    # A product that is in no group has a kernel of its own: its time is not that of the layer before it.
    assert len(floor_of(graph)) > 5 and not any(map(owner, floor_of(graph)))


def test_a_kernel_with_layers_of_several_groups_is_shared_by_their_products(network):
    graph, groups, *_ = network
    shares = shares_of(graph, groups)
    first, second = [group for group in groups if group.kind == "convolution" and len(group.nodes) == 1][:2]
    total = first.macs + second.macs
    expected = {first.id: first.macs / total, second.id: second.macs / total}
    # The DQ of what a group reads is named after the tensor of the group before it; layers decide.
    before = f"{graph.node_by_name[second.nodes[0]].input[0]}_DequantizeLinear"
    assert shares([before, *first.nodes, *second.nodes]) == pytest.approx(expected)
    split = next(group for group in groups if any("/branch." in node for node in group.nodes))
    assert shares([split.nodes[0].partition("/branch.")[0]]) == {split.id: 1.0}  # as an unsplit graph names it
    assert shares(["nothing of this graph"]) == {}


def test_disturbed_runs_do_not_move_a_cost_as_long_as_each_kernel_has_more_quiet_ones(network, monkeypatch):
    """Every run is disturbed in one of 20 kernels, by more than the whole graph takes."""
    graph, groups, *_ = network

    def kernels(models, backend, images, rounds, **options):
        found = {}
        for name, each in (("float", 2e-3), ("int8", 1e-3)):
            seconds = np.full((20, rounds), each)
            seconds[np.arange(rounds) % 20, np.arange(rounds)] += 0.1
            found[name] = [KernelTime("Conv", (groups[n].nodes[0],), row) for n, row in enumerate(seconds)]
        return found

    monkeypatch.setattr(costing, "kernel_times", kernels)
    found = measured_costs(graph, groups, b"", b"", {}, "onnxruntime", np.zeros(0), rounds=20)
    assert found.float_ms == pytest.approx(20 * 2.0) and found.rest_ms == pytest.approx(0)
    assert all(found.groups[group.id] == GroupCost(2.0, 1.0, 0.0) for group in groups[:20])


def test_the_noise_of_many_groups_does_not_add_up_to_a_loss():
    """100 groups of 0.01 ms, each known to 0.01 ms: together 1 ms, known to a tenth of that (squares add up)."""
    costs = {f"g{n}": GroupCost(0.05, 0.04, 0.01) for n in range(100)}
    found = Costs("x", "", True, costs, (Edge("g0", "g1", 0.5), Edge("g1", "g2", 0.25)), 10.0, 0.0)
    assert found.change(costs).ms == pytest.approx(-1.0) and found.change(costs).error_ms == pytest.approx(0.1)
    assert found.change(["g0"]).ms == pytest.approx(0.49) and found.change([]).ms == 0
    assert sum(cost.gain_ms for cost in costs.values()) == pytest.approx(1.0)  # as the solver discounts each alone


def test_the_solver_pays_for_conversions_to_groups_that_stay_float():
    """a alone gains 0.5 and converts to b for 0.8; b, which is not among the choices, stays float in any case."""
    costs = {"a": GroupCost(1.0, 0.5, 0.0), "b": GroupCost(1.0, 5.0, 0.0), "c": GroupCost(1.0, 0.4, 0.0)}
    found = Costs("x", "", True, costs, (Edge("a", "b", 0.8), Edge("b", "c", 0.1), Edge("a", "c", 0.05)), 3.0, 0.0)
    distances = {"a": 1.0, "c": 1.0}
    choices, edges = found.choices(distances), found.edges_among(distances)
    for int8 in ([], ["a"], ["c"], ["a", "c"]):
        assert placement_cost(int8, choices, edges) == pytest.approx(found.change(int8).ms)
    assert solve(choices, edges, np.inf).int8 == ("c",)


def test_a_conversion_takes_a_start_and_a_time_for_each_element():
    """Ten small kernels and a large one: one rate for all would charge the large tensor five times its time."""
    line = ConversionTime(0.005, 1e-7)
    seen = [*[(1000, line.of(1000))] * 10, (1_000_000, line.of(1_000_000))]
    found = ConversionTime.fitted(seen, ConversionTime(1.0, 1.0))
    assert found.of(500_000) == pytest.approx(0.055) and found.start_ms == pytest.approx(0.005)
    assert ConversionTime.fitted([], line) == line
    # Never negative: a larger tensor that takes less is noise.
    assert ConversionTime.fitted([(1000, 0.02), (2000, 0.01)], line).element_ms == 0


def test_a_group_that_is_not_faster_beyond_noise_stays_float_unless_its_neighbors_pay_for_it():
    costs = {
        "fast": GroupCost(2.0, 1.0, 0.1),
        "noisy": GroupCost(2.0, 1.9, 0.1),  # 0.1 ms faster, known to 0.2 ms
        "between": GroupCost(1.0, 1.1, 0.0),
    }
    assert Costs("x", "", True, costs, (), 5.0, 0.0).worth_trying() == ("fast",)
    edges = (Edge("fast", "between", 0.08), Edge("between", "noisy", 0.08))
    # In float it would cost two conversions, 0.16 ms, to save 0.1 ms.
    assert Costs("x", "", True, costs, edges, 5.0, 0.0).worth_trying() == ("fast", "between")
