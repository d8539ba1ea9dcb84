"""Each form in which INT8 graphs use Q/DQ is computed as it is written, by the libraries of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_kernels import FLOOR_DB, GRAPHS, build, images_for

from edgedetr.artifacts import OPENVINO, ORT
from edgedetr.runtime.backends import base, onnxruntime
from edgedetr.runtime.sqnr import sqnr_db

# Forms that a library is known to compute wrongly, and which our graphs therefore avoid (calib/patterns/known.toml).
WRONG = {
    OPENVINO: (
        "Concat of unequal ranges, one scale, Conv",
        "Resize and Conv, Concat, pair, Conv",
        "Concat, pair, MaxPool, Conv",
        "pairs, Concat, Conv",
        "AveragePool that counts its zeros, uint8",
        "Pad, AveragePool, uint8",
        "QLinearConv",
    )
}


@pytest.mark.parametrize("backend", [ORT, OPENVINO])
@pytest.mark.parametrize("form", GRAPHS)
def test_a_form_is_computed_as_it_is_written(form: str, backend: str) -> None:
    if reason := base.get(backend).unavailable():
        pytest.skip(reason)
    read, model = base.get(backend).tensors, build(GRAPHS[form])
    assert read is not None
    data, images = model.SerializeToString(), images_for(model)
    expected = onnxruntime.tensors(data, images, ["y"], optimize=False)["y"]
    assert np.abs(expected).max() > 0.1  # the reference itself computes something
    found = sqnr_db(expected, read(data, images, ["y"])["y"])
    if form in WRONG.get(backend, ()):
        assert found < FLOOR_DB, "right here: take it off the list, and see whether the graphs can use the form again"
    else:
        assert found > FLOOR_DB


def test_openvino_rounds_what_a_concat_gives_a_quantized_convolution_to_whole_numbers() -> None:
    """The fault itself: signed int8 between a Concat and a Conv; with uint8 and zero point 128 it is not there."""
    if reason := base.get(OPENVINO).unavailable():
        pytest.skip(reason)
    read = base.get(OPENVINO).tensors
    assert read is not None
    lines = GRAPHS["Concat, pair, Conv, uint8"]
    signed = [line.replace(" mid ", " i8 ") for line in lines]
    halves = np.full((1, 16, 16, 16), 0.5, np.float32)
    ones = np.full_like(halves, 1.0)
    for written, wrong in ((lines, False), (signed, True)):
        half, one = (read(build(written).SerializeToString(), images, ["y"])["y"] for images in (halves, ones))
        np.testing.assert_allclose(half, one if wrong else one * 16 / 32, rtol=0.05)
