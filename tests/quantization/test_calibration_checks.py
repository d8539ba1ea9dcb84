"""A calibration that cannot be trusted says so and names the tensors; ordinary ones are silent."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from edgedetr.bundle import InputContract
from edgedetr.data.layouts import load
from edgedetr.errors import ExportError
from edgedetr.quantization.calibration import Training, calibrate
from edgedetr.quantization.calibration_checks import clipped_tensors, compare_images, moved_ranges
from edgedetr.quantization.calibration_set import evenly_spaced
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import Histogram


def histogram(*images: np.ndarray, name: str = "t") -> Histogram:
    found = Histogram(name, None)
    for values in images:
        found.observe(np.asarray(values, np.float32))
    return found


def test_ranges_of_the_halves_are_compared_and_the_largest_factor_is_first():
    histograms = {
        "steady": histogram([1.0], [1.05], [0.9], [1.0]),
        "moved": histogram([1.0], [1.0], [1.2], [0.5]),  # 1.2 of the first and third, 1.0 of the others
        "twice": histogram([4.0], [2.0]),
        "once": histogram([0.0], [2.0]),
    }
    found = moved_ranges(histograms, lambda half: half.largest)
    assert list(found) == ["once", "twice", "moved"]
    assert found["once"] == float("inf") and found["twice"] == 2 and found["moved"] == pytest.approx(1.2)


def test_the_clipped_fraction_is_that_of_the_values(rng):
    values = rng.normal(0, 1, 100_000)
    found = clipped_tensors({"a": histogram(values), "b": histogram(values)}, {"a": 1.0, "b": 4.0})
    assert list(found) == ["a"]
    assert found["a"] == pytest.approx((np.abs(values) > 1).mean(), abs=2e-3)  # a bin holds 0.2 % here


def images_of(absmax: np.ndarray) -> dict[str, Histogram]:
    """Histograms of tensors whose largest magnitudes on each image are absmax [T, I]."""
    return {f"t{n}": histogram(*row[:, None], name=f"t{n}") for n, row in enumerate(absmax)}


def test_images_as_far_from_others_as_those_from_each_other_are_of_their_kind(rng):
    level = np.exp(rng.normal(size=(60, 1)))
    draw = lambda count: level * np.exp(0.1 * rng.standard_normal((60, count)))  # noqa: E731
    found = compare_images(images_of(draw(40)), images_of(draw(32)))
    assert found.distance == pytest.approx(1, abs=0.1) and not found.another_kind


def test_images_with_other_magnitudes_are_another_kind_and_the_tensor_that_changed_most_is_first(rng):
    others = np.exp(0.1 * rng.standard_normal((60, 32)))
    images = np.exp(0.1 * rng.standard_normal((60, 40)))
    images[:, :] *= 0.7
    images[7] *= 0.5
    found = compare_images(images_of(images), images_of(others))
    # ln 0.7 is 3.6 spreads of 0.1
    assert found.another_kind and found.distance == pytest.approx(3.8, abs=0.4)
    name, factor = next(iter(found.factors.items()))
    assert name == "t7" and factor == pytest.approx(0.35, rel=0.1)


def graph():
    """images -> contrast = images - mean, size = |contrast|, and inverse = 1 / its largest."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["images", "mean"], ["contrast"]),
        helper.make_node("Abs", ["contrast"], ["size"]),
        helper.make_node("ReduceMax", ["size"], ["largest"], keepdims=1),
        helper.make_node("Reciprocal", ["largest"], ["inverse"]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("inverse", TensorProto.FLOAT, [1, 1, 1, 1])]
    inputs = [value("images", TensorProto.FLOAT, [1, 3, 16, 16])]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )


def noise(folder: Path, contrasts: list[int], rng: np.random.Generator) -> list[Path]:
    """Images of noise of these contrasts around grey."""
    folder.mkdir()
    paths = []
    for number, contrast in enumerate(contrasts):
        pixels = rng.integers(128 - contrast, 128 + contrast, (16, 16, 3), dtype=np.uint8)
        paths.append(folder / f"{number:02}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def said(caplog, paths: list[Path], training: Training | None = None, **settings) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config = QuantConfig(**settings)
        calibrate(graph(), ["contrast", "size"], paths, InputContract(16, 16), config, training=training)
    return caplog.text


def test_ordinary_images_raise_no_alarm(tmp_path, rng, caplog):
    paths = noise(tmp_path / "noise", list(rng.integers(60, 66, 40)), rng)
    assert said(caplog, paths, Training(tuple(paths[::2]), "noise")) == ""


def test_ranges_that_depend_on_which_half_of_the_images_is_seen_are_named(tmp_path, rng, caplog):
    text = said(caplog, noise(tmp_path / "two", [30, 60] * 20, rng), observer="minmax")
    assert "2 of 2 ranges differ by more than 10% between two halves" in text
    assert "'contrast' by a factor of 2.0" in text and "'size' by a factor of 2.0" in text


def test_a_percentile_that_cuts_off_a_tenth_names_the_tensors(tmp_path, rng, caplog):
    text = said(caplog, noise(tmp_path / "noise", [60] * 40, rng), observer="percentile", percentile=90)
    assert "percentile 90 chose clip more than 1% of the values of 2 of 2 tensors" in text
    assert "'contrast' 9." in text or "'contrast' 10." in text


def test_images_of_another_kind_than_the_training_are_noticed_and_both_are_named(tmp_path, rng, caplog):
    training = Training(tuple(noise(tmp_path / "trained", list(rng.integers(60, 66, 32)), rng)), "data/trained")
    text = said(caplog, noise(tmp_path / "other", list(rng.integers(20, 23, 40)), rng), training)
    assert f"images in {tmp_path / 'other'} are of another kind than the training images of data/trained" in text
    assert "times as large" in text and "leave --calib out" in text


def test_infinity_names_the_tensor_and_the_image(tmp_path, rng):
    paths = noise(tmp_path / "noise", [60] * 8, rng)
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(paths[5])  # without contrast: 1 / 0
    with pytest.raises(ExportError, match=r"'inverse' holds NaN or infinity on the calibration image '05.png'"):
        calibrate(graph(), ["contrast", "inverse"], paths, InputContract(16, 16), QuantConfig())


def convolutions() -> tuple[ModelProto, list[str]]:
    """images [1, 3, 64, 64] -> four convolutions with random weights, each with ReLU; and the names of its tensors."""
    rng = np.random.default_rng(0)
    channels = (3, 8, 16, 16, 16)
    constants = [numpy_helper.from_array(np.float32(255), "white")]
    nodes = [helper.make_node("Div", ["images", "white"], ["x0"])]
    for n, (before, after) in enumerate(pairwise(channels)):
        weight = rng.normal(0, np.sqrt(2 / (9 * before)), (after, before, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{n}"))
        nodes.append(helper.make_node("Conv", [f"x{n}", f"w{n}"], [f"c{n}"], strides=[2, 2], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{n}"], [f"x{n + 1}"]))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])
    last = helper.make_tensor_value_info("x4", TensorProto.FLOAT, [1, 16, 4, 4])
    body = helper.make_graph(nodes, "g", [images], [last], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, [f"{kind}{n}" for n in range(4) for kind in "xc"] + ["x4"]


def test_real_images_are_of_the_kind_of_their_own_set_and_cards_are_not_of_that_of_cells(shared_data, caplog):
    def said_of(calibrated: str, split: str, trained: str) -> str:
        caplog.clear()
        paths = evenly_spaced([s.path for s in load(shared_data / calibrated, split).samples], 24)
        own = evenly_spaced([s.path for s in load(shared_data / trained, "train").samples], 24)
        calibrate(*convolutions(), paths, InputContract(64, 64), QuantConfig(), training=Training(tuple(own), trained))
        return caplog.text

    assert "another kind" not in said_of("bccd", "test", "bccd") + said_of("cards", "test", "cards")
    assert "of another kind than the training images of bccd" in said_of("cards", "train", "bccd")
