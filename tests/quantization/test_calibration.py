"""Calibration images that alone decide many ranges are found and named, and ordinary ones are not."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgedetr.bundle import InputContract
from edgedetr.errors import DataError, ExportError
from edgedetr.quantization.calibration import calibrate, changed_ranges, outlier_images
from edgedetr.quantization.calibration_set import CalibrationSet, candidates, check_image_count
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import OBSERVERS

TENSORS, IMAGES = 400, 128


def ordinary(rng: np.random.Generator) -> np.ndarray:
    """[T, I] maxima as a network's are: each image has its own level, each tensor a heavy tail."""
    level = np.exp(0.08 * rng.standard_normal(IMAGES))
    return np.exp(rng.standard_normal((TENSORS, 1))) * level * np.exp(0.1 * rng.gumbel(size=(TENSORS, IMAGES)))


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_images_are_not_named(seed):
    assert outlier_images(ordinary(np.random.default_rng(seed))) == {}


@pytest.mark.parametrize("bad", [[3], [0, 127], [5, 6, 7, 8, 9, 10]])
def test_images_that_exceed_the_others_are_named_however_many_up_to_a_twentieth(bad, rng):
    absmax = ordinary(rng)
    absmax[: TENSORS // 2, bad] *= 3
    found = outlier_images(absmax)
    assert sorted(found) == bad
    assert all(fraction == pytest.approx(0.5, abs=0.1) for fraction in found.values())


def test_images_of_another_kind_are_not_called_a_few(rng):
    absmax = ordinary(rng)
    absmax[:, : IMAGES // 4] *= 3  # a quarter: they are what the detector will see
    assert outlier_images(absmax) == {}


def test_no_images_no_tensors_and_zeros_are_no_trouble():
    assert (
        outlier_images(np.zeros((0, 5))) == outlier_images(np.zeros((5, 1))) == outlier_images(np.zeros((5, 40))) == {}
    )


def test_ranges_that_move_are_listed_with_the_largest_factor_first():
    before = {"a": 1.0, "b": 6.0, "c": 0.5, "d": 1.1, "e": 0.0}
    after = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0, "e": 0.0}
    assert list(changed_ranges(before, after).items()) == [("b", 3.0), ("c", 2.0)]
    assert changed_ranges({"a": 1.0}, {"a": 0.0}) == {"a": float("inf")}


def graph():
    """images -> three tensors that grow with the contrast of an image."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["images", "mean"], ["contrast"]),
        helper.make_node("Abs", ["contrast"], ["size"]),
        helper.make_node("Sqrt", ["size"], ["root"]),
    ]
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [value("images", TensorProto.FLOAT, [1, 3, 16, 16])],
            [value("root", TensorProto.FLOAT, [1, 3, 16, 16])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


@pytest.mark.parametrize("observer", OBSERVERS)
def test_saturated_frames_among_dull_ones_raise_the_alarm_and_are_named(observer, tmp_path, rng, caplog):
    paths = []
    for number in range(40):
        dull = rng.integers(120, 136, (16, 16, 3), dtype=np.uint8)
        noise = rng.integers(0, 2, (16, 16, 3), dtype=np.uint8) * 255
        paths.append(tmp_path / f"{number:02d}.png")
        Image.fromarray(noise if number in (11, 30) else dull).save(paths[-1])
    config = QuantConfig(observer=observer)
    tensors = ["contrast", "size", "root"]
    with caplog.at_level(logging.WARNING):
        amax = calibrate(graph(), tensors, paths, InputContract(16, 16), config)
    assert "11.png (100%)" in caplog.text and "30.png (100%)" in caplog.text and "the other 38 images" in caplog.text
    said = caplog.text
    caplog.clear()
    rest = [path for path in paths if path.stem not in ("11", "30")]
    with caplog.at_level(logging.WARNING):
        good = calibrate(graph(), tensors, rest, InputContract(16, 16), config)
    assert not caplog.text
    changed = [name for name in tensors if max(amax[name], good[name]) > 1.2 * min(amax[name], good[name])]
    assert f"without them {len(changed)} of 3 ranges change by more than 20%" in said


@pytest.mark.parametrize(
    "count, refused, warned",
    [(0, True, False), (7, True, False), (8, False, True), (31, False, True), (32, False, False)],
)
def test_too_few_images_are_refused_and_few_are_warned_of(count, refused, warned, tmp_path, caplog):
    images = CalibrationSet(tuple(tmp_path / str(i) for i in range(count)), ())
    with caplog.at_level(logging.WARNING):
        if refused:
            with pytest.raises(ExportError, match=f"{count} calibration images are too few.*at least 8"):
                check_image_count(images)
        else:
            check_image_count(images)
    assert bool(caplog.text) == warned


def test_a_set_of_two_layouts_is_not_calibrated_on_as_a_folder_of_images(tmp_path):
    bundle = SimpleNamespace(manifest=SimpleNamespace(data=None), path=tmp_path)
    for name in ("images/train/a.jpg", "labels/train/a.txt", "annotations/train.json", "classes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="has annotations of coco and yolo"):
        candidates(bundle, tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "images/train/a.jpg").rename(tmp_path / "plain" / "a.jpg")
    assert candidates(bundle, tmp_path / "plain") == ([tmp_path / "plain" / "a.jpg"], tmp_path / "plain")
