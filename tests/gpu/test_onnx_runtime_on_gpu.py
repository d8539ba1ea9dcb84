"""ONNX Runtime's CUDA provider: the graphs of every member give on the GPU what they give on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from members import exported, sample_images

from edgedetr.models import FAMILY
from edgedetr.runtime.backends import onnxruntime_cuda
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.backends.onnxruntime_cuda import OrtCudaRunner


@pytest.fixture(scope="module", autouse=True)
def provider():
    if reason := onnxruntime_cuda.no_gpu():
        pytest.skip(f"needs ONNX Runtime with CUDA: {reason}")


@pytest.mark.parametrize("name", FAMILY)
def test_detections_are_those_of_the_cpu(name):
    path, images = exported(name, None), sample_images(2).numpy()
    expected, found = OrtRunner(path).run(images), OrtCudaRunner(path).run(images)
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-3, rtol=0)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-4, rtol=0)


def test_the_session_is_on_the_gpu():
    runner = OrtCudaRunner(exported("rt_detr", 1))
    assert runner.session.get_providers()[0] == onnxruntime_cuda.CUDA and runner.name == "onnxruntime-cuda"
