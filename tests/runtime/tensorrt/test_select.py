"""load() takes the engine that fits this device, and says why it did and why it did not take the others."""

from __future__ import annotations

import hashlib
import json
import sys

import fake_cuda
import fake_tensorrt
import frame_graph
import numpy as np
import pytest

from edgedetr.errors import EngineError, MissingDependency, UsageError
from edgedetr.runtime import load
from edgedetr.runtime.backends import base
from edgedetr.runtime.backends.onnxruntime import OrtFrameRunner
from edgedetr.runtime.frame_detector import load_frames
from edgedetr.runtime.tensorrt import engine_cache, engine_metadata, engine_validation, select
from edgedetr.runtime.tensorrt.select import Measurement

FILES = ("model.onnx", "model.fp16.onnx", "model.int8.onnx")


@pytest.fixture
def fake(monkeypatch, bindings):
    fake = fake_cuda.install(monkeypatch)
    return fake_tensorrt.install(monkeypatch, bindings.module("10.3.0"), fake)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bundle(make_bundle):
    return make_bundle(*FILES)


def plan(bundle, precision, *, name="", folder=None, **options):
    source = bundle.path / {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}[precision]
    target = (folder or bundle.path / "engines") / f"{name or precision}.plan"
    return fake_tensorrt.write_plan(source, target, precision=precision, **options)


def test_an_engine_that_fits_is_used_and_named(fake, bundle, red):
    plan(bundle, "int8")
    detector = load(bundle)
    assert (detector.backend, detector.stage) == ("tensorrt", "int8")
    assert detector.description == (
        "int8 on tensorrt (int8.plan fits this device; not verified here yet: Orin, TensorRT 10.3.0)"
    )
    found, expected = detector([red, red])[1], load(bundle, backend="onnxruntime", stage="int8", threads=1)([red])[0]
    np.testing.assert_array_equal(found.xyxy, expected.xyxy)
    np.testing.assert_array_equal(found.class_id, expected.class_id)


def test_int8_goes_before_fp16_before_float32_until_something_was_measured(fake, bundle):
    for precision in ("fp32", "fp16", "int8"):
        plan(bundle, precision)
        assert load(bundle).stage == {"fp32": "onnx"}.get(precision, precision)


@pytest.mark.parametrize(
    "int8, fp16, best, words",
    [
        (Measurement(True, 3.0), Measurement(True, 2.0), "fp16", "verified on this device, 2.00 ms"),
        (Measurement(True, 2.0), Measurement(True, 3.0), "int8", "verified on this device, 2.00 ms"),
        (Measurement(False, 1.0), Measurement(True, 3.0), "fp16", "verified on this device, 3.00 ms"),
        (Measurement(False, 1.0), None, "fp16", "fits this device; not verified here yet"),
        (Measurement(True, 9.0), None, "int8", "verified on this device, 9.00 ms"),
        (None, Measurement(True, 9.0), "fp16", "verified on this device, 9.00 ms"),
        (Measurement(False, 1.0), Measurement(False, 2.0), "int8", "did not pass edgedetr verify here, 1.00 ms"),
    ],
)
def test_what_was_measured_decides(fake, bundle, int8, fp16, best, words):
    for precision, measured in (("int8", int8), ("fp16", fp16)):
        made = plan(bundle, precision, plan_sha256=digest_of(precision))
        if measured:
            select.record_measurements(made.parent, {digest_of(precision): measured})
    chosen = select.pick(select.find_engines(bundle).fitting)
    assert chosen.stage == best
    assert select.reason_for(chosen) == words


def digest_of(word):
    """The tiny plans of two precisions are the same bytes; a record must distinguish them."""
    return hashlib.sha256(str(word).encode()).hexdigest()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"tensorrt": "10.16.1.11"}, "built for TensorRT 10.16.1.11; needed here: TensorRT 10.3.0"),
        ({"sm": 110}, "built for compute capability sm_110; needed here: compute capability sm_87"),
        ({"device": "Thor"}, "built for device Thor; needed here: device Orin"),
        ({"cuda": "13.0"}, "built for CUDA 13.0; needed here: CUDA 12.6"),
        ({"host": "0123456789abcdef"}, "built on another machine"),
        ({"onnx_sha256": "0" * 64}, "built for model.int8.onnx sha256 00000000"),
        ({"onnx": "model.other.onnx"}, "built from model.other.onnx, which is not in this bundle"),
    ],
)
def test_an_engine_of_another_environment_is_not_used_and_the_reason_is_said(fake, bundle, monkeypatch, change, reason):
    monkeypatch.setattr(engine_validation, "host", lambda **_: "fedcba9876543210")
    plan(bundle, "int8", **change)
    detector = load(bundle, threads=1)
    assert detector.backend == "onnxruntime"
    assert f"int8.plan not used: {reason}" in detector.description
    with pytest.raises(
        EngineError, match=f"no engine for int8 that fits here; int8.plan not used: {reason}.*run: edgedetr build"
    ):
        load(bundle, backend="tensorrt", stage="int8")
    assert fake.gone == []  # nothing was deserialized


def test_trust_takes_an_engine_of_another_machine_and_nothing_that_does_not_fit(fake, bundle, monkeypatch):
    monkeypatch.setattr(engine_validation, "host", lambda **_: "fedcba9876543210")
    plan(bundle, "int8", host="0123456789abcdef")
    plan(bundle, "fp16", host="0123456789abcdef", sm=110)
    assert load(bundle, trust=True).description.startswith("int8 on tensorrt")
    with pytest.raises(EngineError, match="fp16.plan not used: built for compute capability sm_110"):
        load(bundle, backend="tensorrt", stage="fp16", trust=True)


def test_an_engine_without_metadata_or_with_damaged_ones_is_not_used(fake, bundle):
    engine_metadata.metadata_path(plan(bundle, "int8")).unlink()
    engine_metadata.metadata_path(plan(bundle, "fp16")).write_text("{")
    said = load(bundle).description
    assert "int8.plan not used: there is no int8.json next to it" in said
    assert "fp16.json: not readable as JSON" in said


def test_a_damaged_plan_is_left_for_the_next_best(fake, bundle, caplog):
    damaged = plan(bundle, "int8")
    damaged.write_bytes(damaged.read_bytes()[:-7])
    plan(bundle, "fp16")
    assert load(bundle).stage == "fp16"
    assert "damaged or replaced" in caplog.text


def test_an_engine_that_tensorrt_refuses_is_left_too(fake, bundle):
    plan(bundle, "int8")
    fake.refuse = {"deserialize"}
    assert "int8.plan not used: " in load(bundle).description
    assert "Internal error: a reason" in load(bundle).description


def test_without_a_driver_or_tensorrt_engines_are_left_with_one_sentence(fake, bundle, monkeypatch):
    plan(bundle, "int8")
    plan(bundle, "fp16")
    fake.fake.fail("cuInit", 100)
    assert "2 engines not used: the NVIDIA driver does not work" in load(bundle).description
    fake.fake.fail("", 0)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "2 engines not used: TensorRT is " in load(bundle).description


def test_without_engines_nothing_of_a_gpu_is_asked(bundle, monkeypatch):
    monkeypatch.setattr(select.gpu, "probe", lambda: pytest.fail("was asked"))
    assert load(bundle).backend == "onnxruntime"


def test_an_artifact_that_is_asked_for_stays_with_onnx_runtime_where_it_is_installed(fake, bundle, monkeypatch):
    plan(bundle, "int8")
    assert load(bundle, stage="int8").backend == "onnxruntime"
    assert load(bundle, stage="int8", backend="tensorrt").backend == "tensorrt"
    monkeypatch.setattr(base, "find_spec", lambda name: None)  # as on a bare board
    assert load(bundle, stage="int8").backend == "tensorrt"
    with pytest.raises(MissingDependency, match="no engine fits"):
        load(bundle, stage="fp16")


def test_the_engine_for_single_images_is_preferred_unless_a_batch_is_asked_for(fake, make_bundle, red):
    bundle = make_bundle("model.int8.onnx", batch="n")
    for batch in (4, 1, (1, 2, 4)):
        plan(bundle, "int8", name=f"b{batch}", batch=batch)
    fake.batches = (1, 2, 4)
    assert "b1.plan" in load(bundle).description
    assert "b4.plan" in load(bundle, batch=4).description
    assert "b(1, 2, 4).plan" in load(bundle, batch=3).description
    assert len(load(bundle, batch=4)([red] * 6)) == 6
    with pytest.raises(UsageError, match="batch is 0"):
        load(bundle, batch=0)


def test_engines_of_a_read_only_bundle_are_found_in_the_users_cache_and_others_there_are_not_mentioned(
    fake, bundle, tmp_path
):
    folder = tmp_path / "cache" / "edgedetr" / "engines"
    assert folder in engine_cache.folders(bundle)
    plan(bundle, "int8", folder=folder)
    plan(bundle, "fp16", folder=folder, onnx_sha256="1" * 64)  # of another bundle
    assert "int8.plan" in load(bundle).description
    assert select.find_engines(bundle).refused == ()
    fake.fake.fail("cuInit", 100)
    assert select.find_engines(bundle) == select.EngineSearch()


def test_a_damaged_record_of_measurements_counts_as_none(fake, bundle, caplog):
    made = plan(bundle, "int8", plan_sha256=digest_of("int8"))
    select.record_measurements(made.parent, {digest_of("int8"): Measurement(True, 1.0)})
    assert select.find_engines(bundle).fitting[0].measured == Measurement(True, 1.0)
    for text in ("{", "[]", json.dumps({digest_of("int8"): {"passed": True}})):
        (made.parent / select.MEASURED).write_text(text)
        assert select.find_engines(bundle).fitting[0].measured is None
    assert "run: edgedetr verify" in caplog.text


def test_images_on_the_device_pass_through_the_detector(fake, bundle, rng):
    plan(bundle, "int8")
    detector = load(bundle)
    images = rng.integers(0, 256, (1, 3, 32, 48)).astype(np.float32)
    cuda = detector.runner.session.cuda
    address = cuda.allocate(images.nbytes)
    fake_cuda.at(address, images.shape)[...] = images

    class OnDevice:
        shape, dtype = images.shape, "float32"

        @property
        def __cuda_array_interface__(self):
            return {"shape": self.shape, "typestr": "<f4", "data": (address, False), "version": 3, "stream": None}

    np.testing.assert_array_equal(detector.run_raw(OnDevice()).logits, detector.run_raw(images).logits)


def test_whole_frames_run_on_their_own_engine_and_detectors_pass_it_over(fake, make_bundle, rng):
    bundle = make_bundle("model.onnx")
    name = "model.frame-24x40.onnx"
    with bundle.add(name, stage="export") as path:
        frame_graph.write(path)
    frame = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    on_cpu = load_frames(bundle, size=(24, 40), threads=1)
    assert on_cpu.runner.name == "onnxruntime"
    fake_tensorrt.write_plan(bundle.path / name, bundle.path / "engines" / "frame.plan")
    on_gpu = load_frames(bundle)
    assert on_gpu.description == (
        "float32 for frames of 24 x 40 on tensorrt (frame.plan fits this device; not verified here yet)"
    )
    np.testing.assert_array_equal(on_gpu(frame).xyxy, on_cpu(frame).xyxy)
    assert load_frames(bundle, make=OrtFrameRunner).runner.name == "onnxruntime"
    assert select.find_engines(bundle) == select.EngineSearch()
    assert load(bundle, threads=1).backend == "onnxruntime"


@pytest.mark.parametrize("under, counts", [("driver 12.4", False), ("driver 12.6", True), ("", False)])
def test_what_was_measured_with_another_driver_counts_no_more(fake, bundle, under, counts):
    made = plan(bundle, "int8", plan_sha256=digest_of("int8"), driver="12.4")  # 12.6 is here
    select.record_measurements(made.parent, {digest_of("int8"): Measurement(True, 1.0, under)})
    found = select.find_engines(bundle).fitting[0]
    assert (found.measured is not None) == counts
    assert ("built with driver 12.4, which is now 12.6" in select.reason_for(found)) != counts


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        "\xff",
        "{" + " " * (2 << 20),
        '{"a": 7}',
        '{"a": {"passed": 1, "p50_ms": 1}}',
        '{"a": {"passed": true, "p50_ms": NaN}}',
        '{"a": {"passed": true, "p50_ms": "1"}}',
        '{"a": {"passed": true, "p50_ms": 1, "under": 5}}',
        '{"a": 5}',
        "9" * 5000,
    ],
)
def test_a_hostile_record_of_measurements_counts_as_none(tmp_path, caplog, text):
    (tmp_path / select.MEASURED).write_bytes(text.encode("latin-1"))
    assert select._measurements(tmp_path) == {}
    assert "run: edgedetr verify" in caplog.text
