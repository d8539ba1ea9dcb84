"""SmoothQuant: the float graph computes the same, and activation and weights share the outliers of their channels."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from graphs import graph_of, run_model
from members import HEIGHT, WIDTH, exported
from onnx import helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.calibration_set import CalibrationImage
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.placement import Placement, alphas_of
from edgedetr.quantization.policy import Policy, make_plan
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.smoothing import Folds, Smoothing, folds_of, smoothed, smoothing_factors, smoothings

POLICY = Policy("all")
WIDTHS = (32, 64, 32)


def two_linears(rng, residual=False):
    """images [.., 32] -> LayerNormalization "n" -> Linear, Relu "r" -> Linear -> y (+ n); two channels are outliers."""
    gain = np.where(np.isin(np.arange(WIDTHS[0]), (3, 7)), 40, 1) * rng.uniform(0.5, 1, WIDTHS[0])
    constants = {
        "gain": gain,
        "shift": rng.normal(0, 1, WIDTHS[0]),
        "w1": rng.normal(0, 0.2, WIDTHS[:2]),
        "b1": rng.normal(0, 1, WIDTHS[1]),
        "w2": rng.normal(0, 0.2, WIDTHS[1:]),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["images", "gain", "shift"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w1"], ["p1"], "one"),
        helper.make_node("Add", ["b1", "p1"], ["s1"], "bias"),
        helper.make_node("Relu", ["s1"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w2"], ["p2"], "two"),
        helper.make_node("Add", ["p2", "n"], ["y"], "sum") if residual else helper.make_node("Neg", ["p2"], ["y"], "n"),
    ]
    return GraphIndex(graph_of(nodes, constants, (1, 20, WIDTHS[0]), name="images"))


def folds(graph: GraphIndex, alpha: float = 0.5, placement: Placement | None = None) -> Folds:
    return folds_of(graph, make_plan(graph, POLICY), alphas_of(graph, POLICY, placement, alpha))


def test_factors_are_those_of_equation_4():
    found = smoothing_factors(np.float32([16, 4, 0, 3]), np.float32([1, 4, 2, 0]), 0.5)
    np.testing.assert_allclose(found, [4, 1, 1, 1])  # sqrt(16 / 1), sqrt(4 / 4), and two channels without a product
    np.testing.assert_allclose(smoothing_factors(np.float32([16]), np.float32([2]), 1.0), [16])  # moves all


def test_a_norm_and_a_linear_behind_a_relu_compute_the_same_with_shared_outliers(rng):
    graph = two_linears(rng)
    found = folds(graph)
    assert [fold.tensor for fold in found.possible] == ["n", "r"] and not found.left
    images = [rng.normal(0, 1, (1, 20, WIDTHS[0])).astype(np.float32) for _ in range(3)]
    factors = smoothings(graph, found.possible, images)
    model = smoothed(graph, factors)
    before, after = GraphSession(graph.model, ["n", "r", "y"]), GraphSession(model, ["n", "r", "y"])
    pairs = [(before.run({"images": image}), after.run({"images": image})) for image in images]
    scale = max(float(np.abs(one["y"]).max()) for one, _ in pairs)
    for one, other in pairs:
        np.testing.assert_allclose(other["y"], one["y"], atol=1e-5 * scale)
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    # The columns of the first weight are divided for "r", which has no part in what its rows take of "n".
    for tensor, weight in (("n", weights["w1"] * np.array(factors["r"].factors)), ("r", weights["w2"])):
        channels = np.max([np.abs(other[tensor]).max((0, 1)) for _, other in pairs], axis=0)
        rows = np.abs(weight).max(1)
        used = channels > 0
        np.testing.assert_allclose(channels[used], rows[used], rtol=1e-5)  # alpha 0.5: both are sqrt(x w)
    largest = [max(float(np.abs(pair[side]["n"]).max()) for pair in pairs) for side in (0, 1)]
    assert largest[1] < largest[0] / 10


def test_what_another_node_reads_stays_as_it_is_with_the_reason(rng):
    graph = two_linears(rng, residual=True)
    found = folds(graph)
    assert [fold.tensor for fold in found.possible] == ["r"] and found.left == {"n": "Add reads it too"}
    assert folds(graph, 0.0) == Folds((), {})
    one = folds(graph, 0.0, Placement(("two",), smooth={"two": 0.7})).possible
    assert [(fold.tensor, fold.alpha) for fold in one] == [("r", 0.7)]
    with pytest.raises(ExportError, match="'r' cannot be divided by its 2 factors"):
        smoothed(graph, {"r": Smoothing(0.5, (1.0, 2.0))})


def test_a_whole_detector_computes_the_same(rng):
    graph = GraphIndex(split_concats(onnx.load(exported("detr"))))
    found = folds(graph)
    assert found.possible and found.left
    images = [rng.uniform(0, 255, (1, 3, HEIGHT, WIDTH)).astype(np.float32) for _ in range(2)]
    model = smoothed(graph, smoothings(graph, found.possible, images))
    assert model != graph.model
    for image in images:
        for one, other in zip(run_model(graph.model, images=image), run_model(model, images=image)):
            np.testing.assert_allclose(other, one, atol=1e-5)  # logits and boxes of about 1


def test_factors_are_read_back_and_bad_ones_are_refused(tmp_path):
    path = tmp_path / "ranges.json"
    images = (CalibrationImage("0" * 64, "a.png"),)
    ranges = Ranges({"x": 1.0}, "mse", "default", 1, "", images, smooth={"x": Smoothing(0.5, (2.0, 0.25))})
    ranges.save(path)
    assert Ranges.load(path) == ranges
    raw = json.loads(path.read_text())
    for bad in ([0.0, 1.0], ["2"], None):
        raw["smooth"]["x"]["factors"] = bad
        path.write_text(json.dumps(raw))
        with pytest.raises(ExportError, match="smooth of 'x' is"):
            Ranges.load(path)
