"""Latency of the artifacts of a bundle."""

from __future__ import annotations

import pytest

from edgedetr.artifacts import GRAPHS
from edgedetr.evaluation.bench import bench


def test_every_artifact_is_timed_on_each_of_its_libraries(make_bundle):
    quantized_bundle = make_bundle(onnx=(6.0, 6.0), int8=(5.9, 6.0), int8_cpu=(5.9, 6.0))
    timings = bench(quantized_bundle, rounds=3, threads=1)
    assert {(t.name, t.backend) for t in timings} == {
        ("onnx", "onnxruntime"),
        ("onnx", "openvino"),
        ("int8", "openvino"),
        ("int8-cpu", "onnxruntime"),
        ("int8-cpu", "openvino"),
    }
    for timing in timings:
        assert 0 < timing.p50_ms <= timing.p99_ms
        assert timing.size_mb == pytest.approx((quantized_bundle.path / GRAPHS[timing.name].file).stat().st_size / 1e6)
