"""Distances measured from cuts through the graph equal those of whole runs."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from members import SMALL, exported, sample_images
from tiny_network import SIGNED

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.distance_meter import OUTPUTS, DistanceMeter
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.matched_distance import distances
from edgedetr.quantization.placement import Placement, RangesByObserver, plan_for, quantized_model
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.target import CPU
from edgedetr.runtime.backends.base import RawOutputs

IMAGES = 2
POLICY = load_policy("default")


@cache
def prepared(member):
    """A member, its graph, images, and the ranges of all groups on them."""
    graph = GraphIndex(split_concats(onnx.load(exported(member, 1))))
    every = Placement(tuple(group.id for group in groups_of(graph, POLICY)))
    names = [name for name in tensors_to_observe(graph, plan_for(graph, POLICY, every)) if name != "images"]
    batches = [image[None] for image in sample_images(IMAGES).numpy()]
    session = GraphSession(graph.model, names)
    amax = {"images": 255.0} | dict.fromkeys(names, 0.0)
    for batch in batches:
        for name, value in session.run({"images": batch}).items():
            amax[name] = max(amax[name], float(np.abs(value).max()))
    return member, graph, batches, RangesByObserver("minmax", {"minmax": amax})


@pytest.fixture
def case():
    return prepared("detr")


def measured(case, placements, target=SIGNED, memory=1 << 30, **options):
    name, graph, batches, ranges = case
    meter = DistanceMeter(graph, POLICY, ranges, target, SMALL[name].activation, memory)
    found = np.full((len(placements), IMAGES), np.nan)

    def report(placement, image, distance):
        found[placement, image] = distance

    meter.measure(placements, IMAGES, batches.__getitem__, report=report, **options)
    return found, meter


def whole_run(case, placement, target):
    """The same by running whole graphs without optimizations."""
    name, graph, batches, ranges = case
    models = (graph.model, quantized_model(graph, POLICY, placement, ranges, target))
    sessions = [GraphSession(model, OUTPUTS) for model in models]
    pairs = [[RawOutputs(*session.run({"images": b}).values()) for session in sessions] for b in batches]
    identity = not any(node.op_type == "TopK" for node in graph.nodes)
    return [distances(a, b, SMALL[name].activation, by_identity=identity)[0] for a, b in pairs]


@pytest.mark.parametrize("name, target", [("detr", SIGNED), ("detr", CPU), ("rt_detr", SIGNED)])
def test_a_distance_from_a_cut_is_that_of_whole_runs(name, target):
    case = prepared(name)
    groups = groups_of(case[1], POLICY)
    placements = [Placement((group.id,)) for group in groups[len(groups) // 3 :: len(groups) // 5]]
    found, meter = measured(case, placements, target)
    expected = np.array([whole_run(case, placement, target) for placement in placements])
    # A value at a tie rounds to either level, and the layers behind amplify that in a network with random weights.
    assert np.quantile(np.abs(found - expected) / (expected + 1e-3), 0.75) < 0.05
    assert found.mean() == pytest.approx(expected.mean(), rel=0.2)
    assert 0 < meter.cost.forwards < 0.8 * meter.cost.whole


def test_with_all_groups_off_the_distance_is_exactly_zero(case):
    assert (measured(case, [Placement(())])[0] == 0).all()


def test_float_rounding_alone_is_far_below_what_int8_does(case):
    _, meter = measured(case, [])
    assert meter.float_gap(case[2][:1]) < 1e-3


def test_little_memory_gives_the_same_distances_image_by_image(case):
    groups = groups_of(case[1], POLICY)
    placements = [Placement((groups[3].id,)), Placement((groups[-2].id, groups[-3].id))]
    np.testing.assert_array_equal(measured(case, placements)[0], measured(case, placements, memory=1)[0])


def test_known_pairs_are_not_measured_again(case):
    groups = groups_of(case[1], POLICY)
    placements = [Placement((groups[5].id,)), Placement((groups[6].id,))]
    found, meter = measured(case, placements, known=lambda placement, image: (placement, image) != (1, 1))
    assert np.isnan(found).sum() == 3 and np.isfinite(found[1, 1])
    assert meter.cost.whole == 2  # the float model and the placement, on one image
    _, idle = measured(case, placements, known=lambda placement, image: True)
    assert idle.cost.forwards == 0
