"""The registry of backends: a record for each, and everybody who lists backends asks it."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from edgedetr import artifacts
from edgedetr.artifacts import BACKENDS, verified_pairs
from edgedetr.errors import UsageError
from edgedetr.evaluation.artifacts_run import candidates
from edgedetr.evaluation.first_divergence import find_first_divergence
from edgedetr.runtime import bundle_detector, load
from edgedetr.runtime.backends import base
from edgedetr.runtime.backends.base import Backend
from edgedetr.runtime.backends.onnxruntime import OrtRunner


def test_every_backend_has_a_record_of_its_name():
    assert [backend.name for backend in base.backends()] == list(BACKENDS)
    assert [backend.name for backend in base.backends() if backend.is_reference] == ["onnxruntime"]
    assert [backend.name for backend in base.backends() if backend.runs_engines] == ["tensorrt"]
    assert all(backend.device in ("cpu", "cuda") for backend in base.backends())


def test_what_is_verified_is_in_the_order_of_the_recorded_verdicts():
    recorded = [
        ("onnx", "onnxruntime"),
        ("fp16", "onnxruntime"),
        ("int8", "onnxruntime"),
        ("int8", "openvino"),
        ("int8-cpu", "onnxruntime"),
        ("int8-cpu", "openvino"),
        ("onnx", "onnxruntime-cuda"),
        ("fp16", "onnxruntime-cuda"),
    ]
    assert [pair for pair in verified_pairs() if pair in recorded] == recorded  # newer ones are between them


def test_an_unknown_backend_is_a_usage_error_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"'onnx-runtime'; expected one of onnxruntime, .*did you mean 'onnxruntime'"):
        base.get("onnx-runtime")


@pytest.fixture
def loud(monkeypatch) -> list[str]:
    """A new backend, "loud", in the table of artifacts.py; it notes what it opens."""
    opened: list[str] = []

    class LoudRunner(OrtRunner):
        name = "loud"

        def __init__(self, path, *, threads=None):
            opened.append(path.name)
            super().__init__(path, threads=threads)

    module = ModuleType("loud")
    module.BACKEND = Backend("loud", "numpy", LoudRunner)
    monkeypatch.setitem(sys.modules, "edgedetr.runtime.backends.loud", module)
    for table in (artifacts, base, bundle_detector):
        monkeypatch.setattr(table, "BACKENDS", (*BACKENDS, "loud"))
    return opened


def test_a_registered_backend_is_loaded_and_named_in_errors(make_bundle, red, loud):
    bundle = make_bundle("model.onnx", "model.int8.onnx")
    detector = load(bundle, backend="loud")
    assert (detector.backend, detector.stage, loud) == ("loud", "onnx", ["model.onnx"])
    assert detector([red])[0].data["class_name"][0] == "red cell"
    assert candidates(bundle, [("int8", "loud")]) == [("int8", "loud")]
    with pytest.raises(UsageError, match=r"expected one of .*tensorrt.*, loud"):
        load(bundle, backend="quiet")
    with pytest.raises(UsageError, match="'loud', which cannot read tensors"):
        find_first_divergence(bundle.path / "model.onnx", "loud", np.zeros((1, 3, 32, 48), np.float32))
