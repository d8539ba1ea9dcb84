"""ranges.json is read strictly."""

from __future__ import annotations

import json

import pytest

from edgedetr.errors import ExportError
from edgedetr.quantization.calibration_set import CalibrationImage, image_list_digest
from edgedetr.quantization.ranges import Ranges

IMAGES = (CalibrationImage("a" * 64, "one.jpg"), CalibrationImage("b" * 64, "two.jpg"))
RANGES = Ranges({"x": 1.5, "y": 0.0}, "mse", "default", 2, "", IMAGES)


def test_what_is_saved_is_what_is_read(tmp_path):
    RANGES.save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json") == RANGES


def test_the_image_list_digest_depends_on_the_images_and_their_order_not_on_names():
    renamed = (CalibrationImage("a" * 64, "elsewhere.jpg"), IMAGES[1])
    assert image_list_digest(renamed) == image_list_digest(IMAGES)
    assert image_list_digest(IMAGES[::-1]) != image_list_digest(IMAGES)


@pytest.mark.parametrize(
    "change",
    [
        {"amax": {"x": -1.0}},
        {"amax": {"x": "wide"}},
        {"amax": [1]},
        {"schema": 9},
        {"images": []},
        {"images": [{"name": "x"}]},
        {"extra": 1},
        {"wanted": None},
        {"wanted": True},
        {"schema": True},
        {"amax": {"x": 1e39}},
        {"amax": {"x": 10**400}},
        {"amax": {"x": True}},
        {"amax": {"x": None}},
        {"observer": 3},
        {"images": {"a": 1}},
        {"images": [3]},
        {"images": [{"sha256": "a", "name": "x"}]},
        {"source": None},
    ],
    ids=str,
)
def test_a_changed_file_is_refused(tmp_path, change):
    path = tmp_path / "ranges.json"
    RANGES.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ExportError, match=r"damaged or of another kind.*run: edgedetr export"):
        Ranges.load(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"amax": {"x": NaN}}', "[" * 100_000, '{"a":' * 100_000, '{"wanted": ' + "9" * 5000 + "}"],
    ids=range(8),
)
def test_what_is_no_ranges_file_is_refused(tmp_path, text):
    path = tmp_path / "ranges.json"
    path.write_text(text)
    with pytest.raises(ExportError, match="damaged or of another kind"):
        Ranges.load(path)


def test_infinity_and_nan_are_refused(tmp_path):
    path = tmp_path / "ranges.json"
    RANGES.save(path)
    path.write_text(path.read_text().replace("1.5", "Infinity"))
    with pytest.raises(ExportError, match="finite number"):
        Ranges.load(path)
