"""Measured costs: every kernel's time goes to one group or to none, on each library that runs here."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from members import HEIGHT, WIDTH, exported

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantize import int8_graph
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.search.costs import Costs, GroupCost, measured_costs, owner_of
from edgedetr.quantization.search.front import Edge
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
