"""ONNX Runtime's CUDA provider as a backend: chosen where it works, never in silence replaced by the CPU.

What it computes is checked on a GPU (tests/gpu); here the session is the CPU's, and says that it is another.
"""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest

from edgedetr.artifacts import verified_pairs
from edgedetr.errors import DeviceError, MissingDependency
from edgedetr.evaluation.artifacts_run import candidates
from edgedetr.runtime import load
from edgedetr.runtime.backends import onnxruntime_cuda as ort
from edgedetr.runtime.backends.onnxruntime_cuda import CUDA, OrtCudaRunner


@pytest.fixture
def claimed(monkeypatch):
    """A machine that seems to have all that is needed."""
    monkeypatch.setattr(ort, "no_gpu", lambda: "")
    monkeypatch.setattr(ort, "BACKEND", replace(ort.BACKEND, why_unavailable=lambda: ""))


@pytest.fixture
def working(monkeypatch, claimed):
    """... and does: sessions say that they are on the GPU. What they were asked for, in order."""
    asked, real = [], onnxruntime.InferenceSession

    def session(model, options, providers):
        made = real(model, options, providers=["CPUExecutionProvider"])
        asked.append(providers)
        if len(providers) > 1:
            made.get_providers = lambda: [CUDA, "CPUExecutionProvider"]
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


def test_without_a_gpu_the_driver_is_named(make_bundle):
    if not ort.no_gpu():
        pytest.skip("needs a machine without a GPU, or an ONNX Runtime for the CPU")
    bundle = make_bundle()
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        load(bundle, backend="onnxruntime-cuda")
    with pytest.raises(MissingDependency, match="no NVIDIA driver"):
        candidates(bundle, verified_pairs(), None, ["onnxruntime-cuda"])
    assert "onnxruntime-cuda" not in [backend for _, backend in candidates(bundle, verified_pairs())]


def test_an_onnx_runtime_without_cuda_is_named_with_the_command(cuda, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDAExecutionProvider; run: pip uninstall -y onnxruntime && pip install onnxruntime-gpu" in (
        ort.no_gpu()
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    assert ort.no_gpu() == ""


def test_a_session_that_would_run_on_the_cpu_is_an_error_and_the_default_falls_back(make_bundle, claimed, red, caplog):
    """The real thing: this ONNX Runtime goes on without the provider that it does not have."""
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("needs an ONNX Runtime for the CPU")
    bundle = make_bundle()
    with pytest.warns(UserWarning, match=CUDA), pytest.raises(DeviceError, match="would run on the CPU"):
        OrtCudaRunner(bundle.path / "model.onnx")
    with pytest.warns(UserWarning, match=CUDA):
        detector = load(bundle)
    assert detector.backend == "onnxruntime" and "the GPU not used" in detector.description
    assert "would run on the CPU" in caplog.text and len(detector([red])[0]) == 6


def test_where_it_works_it_is_the_default_in_float32(make_bundle, working, red):
    detector = load(make_bundle("model.onnx", "model.fp16.onnx", "model.int8-cpu.onnx"))
    assert (detector.stage, detector.backend) == ("onnx", "onnxruntime-cuda") and "GPU" in detector.description
    assert working == [[(CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"]]
    assert len(detector([red])[0]) == 6


def test_what_the_library_prints_while_it_looks_for_cuda_is_no_output(make_bundle, working, monkeypatch, capsys):
    """Standard output belongs to predict's lines of JSON."""
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"), raising=False)
    load(make_bundle())
    printed = capsys.readouterr()
    assert not printed.out and "libcudnn" in printed.err


def test_quantized_graphs_stay_on_the_cpu_and_are_warned_of_where_asked_for(make_bundle, working, caplog):
    bundle = make_bundle("model.onnx", "model.fp16.onnx", "model.int8-cpu.onnx", "model.int8.onnx")
    assert load(bundle, stage="int8-cpu").backend == "onnxruntime"
    assert load(bundle, stage="fp16").backend == "onnxruntime-cuda"
    assert not caplog.text
    assert load(bundle, stage="int8", backend="onnxruntime-cuda").backend == "onnxruntime-cuda"
    assert "does not compute quantized graphs as they are written" in caplog.text and "edgedetr build" in caplog.text


def test_verify_takes_its_artifacts_where_it_works(make_bundle, working, monkeypatch):
    bundle = make_bundle("model.onnx", "model.fp16.onnx", "model.int8.onnx")
    found = candidates(bundle, verified_pairs())
    assert [artifact for artifact, backend in found if backend == "onnxruntime-cuda"] == ["onnx", "fp16"]
