"""The student rounds where the INT8 graph rounds, and computes what ONNX Runtime computes of that graph."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_quantization import clipped_ranges, largest_differences
from members import CLASSES, HEIGHT, SMALL, WIDTH, config_of, exported, sample_images, small

from edgedetr.errors import TrainingError
from edgedetr.models import build
from edgedetr.models.deploy import fusable, fuse, load_fused
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import Policy, Product, load_policy, make_plan
from edgedetr.quantization.quantize import read_onnx
from edgedetr.quantization.quantized_weight import quantize_weight
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.training.qat.quantizers import QuantizedConv2d, TensorRange, weight_scale
from edgedetr.training.qat.student import learned_ranges, make_student

pytest.importorskip("modelopt")

EVERYTHING = Policy("everything")  # decoder and heads too
# Members whose heads and positions are called several times, some calls of which the graph lacks or computes from
# constants.
CALLED_OFTEN = ("deformable_detr", "dn_detr", "dynamic_detr")
# Of those with the default policy, the ones that differ in how a layer is found; the others are slow tests.
OFTEN_TESTED = ("detr", "rt_detr", "d_fine", "sparse_rcnn", "rf_detr")
CASES = [
    *[
        pytest.param(name, load_policy("default"), marks=[] if name in OFTEN_TESTED else pytest.mark.slow)
        for name in SMALL
    ],
    *[(name, EVERYTHING) for name in CALLED_OFTEN],
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def student_of(name, policy=None):
    """-> student, graph, plan, ranges of a member at micro size."""
    graph = GraphIndex(split_concats(read_onnx(exported(name))))
    plan = make_plan(graph, policy or load_policy("default"))
    amax = clipped_ranges(graph.model, plan, sample_images(1).numpy())
    return make_student(small(name), graph, plan, amax, size=(HEIGHT, WIDTH)), graph, plan, amax


@pytest.mark.parametrize(("name", "policy"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_tensor_and_the_outputs_equal_those_of_the_int8_graph(name, policy):
    student, graph, plan, amax = student_of(name, policy)
    differences = largest_differences(student, graph, plan, amax, sample_images(1).numpy())
    assert max(differences.values()) < 1e-5, max(differences, key=differences.get)


@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_ranges_come_back_as_they_were_given(name):
    student, _, _, amax = student_of(name)
    found = learned_ranges(student)
    assert found == pytest.approx({tensor: amax[tensor] for tensor in found}, rel=1e-12)


def test_a_copy_rounds_with_its_own_ranges():
    student, _, _, _ = student_of("rt_detr")
    images = student.normalize(sample_images(1))
    before = student(images, last_only=True).logits
    average = copy.deepcopy(student)
    with torch.no_grad():
        for one in average.ranges:
            one.log_growth.sub_(3)
    assert torch.equal(student(images, last_only=True).logits, before)
    assert not torch.equal(average(images, last_only=True).logits, before)


def test_every_forward_pass_begins_with_the_first_range_of_a_layer_that_is_called_often():
    student, _, _, _ = student_of("dn_detr", EVERYTHING)
    images = student.normalize(sample_images(1))
    for model in (student, copy.deepcopy(student)):
        assert torch.equal(model(images, last_only=True).boxes, model(images, last_only=True).boxes)


def test_a_plan_with_places_that_pytorch_lacks_is_refused_by_name():
    _, graph, plan, amax = student_of("detr")
    node = next(node for node in graph.nodes if node.op_type == "MatMul" and node.input[1] not in graph.initializers)
    with_product = replace(plan, products=(Product(node.name, (node.input[0], node.input[1])),))
    more = dict.fromkeys(node.input, 1.0)
    with pytest.raises(TrainingError, match=f"missing.*{node.name}"):
        make_student(small("detr"), graph, with_product, amax | more, size=(HEIGHT, WIDTH))


def test_a_quantizer_that_meets_another_tensor_is_refused_by_name():
    _, graph, plan, amax = student_of("detr")
    other = small("detr")
    with torch.no_grad():
        other.encoder.layers[0].attention.v.weight.mul_(2)  # no longer the network of the graph
    with pytest.raises(TrainingError, match="encoder.*differs in .* of its values"):
        make_student(other, graph, plan, amax, size=(HEIGHT, WIDTH))


def test_a_weight_that_is_int8_in_one_call_and_float_in_another_is_refused_by_name():
    _, graph, plan, amax = student_of("dn_detr")
    shared = [layer.node for layer in plan.layers if "position_scale/layers.0" in layer.node]
    assert len(shared) == 2
    fewer = replace(plan, layers=tuple(layer for layer in plan.layers if layer.node != shared[1]))
    with pytest.raises(TrainingError, match=r"position_scale\.layers\.0 is INT8 in .* and float in"):
        make_student(small("dn_detr"), graph, fewer, amax, size=(HEIGHT, WIDTH))


def test_a_pool_keeps_one_range_on_both_sides_however_it_is_trained():
    student, graph, plan, amax = student_of("detr")
    with torch.no_grad():
        for number, one in enumerate(student.ranges):
            one.log_growth.add_(0.01 * (number + 1))
    trained = {**amax, **learned_ranges(student)}
    assert share_pool_ranges(graph.model, trained) == trained
    assert max(largest_differences(student, graph, plan, trained, sample_images(1).numpy()).values()) < 1e-5


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_rounding_gives_the_levels_of_the_signed_grid_worked_out_by_hand():
    quantizer = TensorRange("x", 127.0, learned=False)  # a step of 1
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.4, 127.4, 300.0, -127.6, -128.4, -300.0])
    wanted = torch.tensor([0.0, 2.0, -0.0, -2.0, 126.0, 127.0, 127.0, -128.0, -128.0, -128.0])  # ties to even
    assert torch.equal(quantizer(x), wanted)


def test_the_gradient_of_a_range_is_that_of_learned_step_size_quantization():
    """Esser et al. 2020, eq. 3: round(v) - v inside, -128 or 127 outside, times its scale factor, eq. 4 in the text."""
    quantizer = TensorRange("x", 2.0, learned=True)
    x = torch.linspace(-3, 3, 41, dtype=torch.float32, requires_grad=True)
    upstream = torch.linspace(1, 2, 41)
    (quantizer(x) * upstream).sum().backward()
    step = 2.0 / 127
    v = x.detach().double() / step
    inside = v.abs() <= 127
    of_step = torch.where(inside, v.round() - v, v.sign() * 127 - (v < 0).double())
    wanted = float((of_step * upstream).sum()) * step * (41 * 127) ** -0.5  # by the logarithm: times the step
    assert quantizer.log_growth.grad.item() == pytest.approx(wanted, rel=1e-3)
    assert torch.equal(x.grad, torch.where(inside, upstream, torch.zeros(())))


@pytest.mark.parametrize("bias", [None, np.array([0.1, 5e7, 0.0, 2.0], np.float32)])
def test_weights_have_the_scales_and_levels_that_export_gives_them(bias):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 6, 3, 3)).astype(np.float32)
    weight[2] = 0
    scale = 3.0 / 127
    expected = quantize_weight(weight, 0, bias=bias, data_scale=scale / 2)
    tensor = None if bias is None else torch.from_numpy(bias)
    found = weight_scale(torch.from_numpy(weight), tensor, torch.tensor(scale, dtype=torch.float64))
    assert np.array_equal(found.numpy(), expected.scale)


# ------------------------------------------------------------------------------------------------- back to a bundle


@pytest.mark.parametrize("name", ["detr", "rt_detr", "rf_detr", "d_fine"])  # every module that fuses
def test_a_detector_takes_trained_fused_weights_so_that_fusing_gives_exactly_them(name):
    trained = small(name)
    fuse(trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    detector = build(name.partition("+")[0], config_of(name), CLASSES).eval()
    assert list(fusable(detector))
    load_fused(detector, trained)
    fuse(detector)
    wanted, found = trained.state_dict(), detector.state_dict()
    assert wanted.keys() == found.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []


def test_convolutions_of_a_student_are_the_quantized_ones_of_the_plan():
    student, _, plan, _ = student_of("rt_detr")
    convolutions = {layer.node.partition("/branch.")[0] for layer in plan.layers if layer.op == "Conv"}
    assert sum(isinstance(module, QuantizedConv2d) for module in student.modules()) == len(convolutions)
