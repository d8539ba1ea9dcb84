"""What TensorRT or an engine refuses is said in its own words, and nothing stays allocated."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from engine_outputs import random_images

from edgedetr.errors import DeviceError, EngineError, UsageError
from edgedetr.runtime.tensorrt import engine_metadata
from edgedetr.runtime.tensorrt.trt_runner import Session, TrtRunner


@pytest.mark.parametrize(
    "images, what",
    [
        (np.zeros((1, 3, 32, 40), np.float32), r"float32 \[1, 3, 32, 40\]"),
        (np.zeros((1, 3, 32, 48)), "float64"),
        (np.zeros((3, 32, 48), np.float32), r"\[3, 32, 48\]"),
    ],
)
def test_arrays_that_the_engine_does_not_take_are_refused_before_any_copy(plan, latest, images, what):
    runner = TrtRunner(plan())
    with pytest.raises(UsageError, match=f"images is .*{what}.* takes float32 .1, 3, 32, 48."):
        runner.session.run({"images": images})
    with pytest.raises(UsageError, match=r"takes \['images'\], not \['frames'\]"):
        runner.session.run({"frames": images})
    assert "cudaMemcpyAsync" not in latest.fake.log


@pytest.mark.parametrize(
    "call, error",
    [
        ("deserialize", "cannot deserialize it .Internal error: a reason.; build it here"),
        ("context", "no execution context .Internal error: a reason"),
        ("set_input_shape", "TensorRT failed at input images of .1, 3, 32, 48.: Internal error: a reason"),
        ("infer_shapes", "TensorRT failed at inferring shapes: Internal error: a reason"),
        ("set_tensor_address", "TensorRT failed at the address of images: Internal error: a reason"),
        ("execute", "TensorRT failed at queueing the engine: Internal error: a reason"),
    ],
)
@pytest.mark.parametrize("report", ["Internal error: a reason", ""])
def test_what_tensorrt_refuses_is_said_with_its_own_words_and_nothing_stays_allocated(
    plan, latest, rng, call, error, report
):
    latest.refuse, latest.report = {call}, report
    if not report:
        error = error.replace("Internal error: a reason", "(no reason given|probably too little memory)")
    with pytest.raises(EngineError, match=error):
        runner = TrtRunner(plan())
        try:
            runner.run(random_images(rng))
        finally:
            runner.close()
    assert not any(latest.fake.live().values())


def test_an_error_that_is_recorded_while_running_is_not_lost(plan, latest, rng):
    runner = TrtRunner(plan())
    runner.run(random_images(rng))
    runner.session._slots[0].errors.report_error(7, " Cask: an asynchronous failure ")
    with pytest.raises(EngineError, match="reported at running the engine: Cask: an asynchronous failure"):
        runner.run(random_images(rng))
    runner.run(random_images(rng))  # reported once


def test_the_recorder_follows_the_protocol_of_tensorrt(plan, behavior):
    recorder = TrtRunner(plan()).session._errors
    recorder.report_error("code", " text ")
    assert (recorder.num_errors(), recorder.get_error_code(0), recorder.get_error_desc(0)) == (1, "code", "text")
    assert not recorder.has_overflowed()
    recorder.clear()
    assert recorder.num_errors() == 0


def test_a_device_without_memory_says_so_and_keeps_nothing(plan, latest, rng):
    runner = TrtRunner(plan())
    latest.fake.fail("cudaMalloc", 2, after=1)  # the second buffer does not fit
    with pytest.raises(DeviceError, match="Orin is out of memory: a buffer of"):
        runner.run(random_images(rng))
    runner.close()
    assert not any(latest.fake.live().values())


@pytest.mark.parametrize(
    "change, error",
    [
        ({"location": "HOST"}, "must be in host memory"),
        ({"layout": "CHW4"}, "has the layout CHW4; expected LINEAR"),
        (
            {"kinds": {"logits": "BF16"}},
            "tensor logits is BF16, which numpy does not have; expected one of FLOAT, HALF",
        ),
        ({"kinds": {"images": "HALF"}}, "images is float16 .1, 3, 32, 48.; expected float32 .B, 3, H, W."),
    ],
)
def test_engines_with_unexpected_tensors_are_refused(plan, latest, change, error):
    for name, value in change.items():
        setattr(latest, name, value)
    with pytest.raises(EngineError, match=error):
        TrtRunner(plan())
    assert latest.gone == ["engine", "runtime"]


def test_an_output_whose_shape_depends_on_the_data_is_refused(plan, latest, rng):
    latest.open_output = True
    runner = TrtRunner(plan())
    with pytest.raises(EngineError, match="tensor boxes has the shape .-1, 3, 4., which depends on the data"):
        runner.run(random_images(rng))


def test_an_engine_of_another_contract_is_refused(plan, latest, tmp_path, tiny_graph, monkeypatch):
    path = plan()
    tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)), names=("points", "boxes"))
    (engine_metadata.metadata_path(path)).unlink()
    with pytest.raises(EngineError, match=r"outputs \['boxes', 'points'\]; expected images"):
        TrtRunner(path, trust=True)
    assert latest.gone == ["engine", "runtime"]


def test_nothing_of_tensorrt_is_touched_without_a_driver_or_before_the_plan_is_checked(plan, latest, monkeypatch):
    path = plan()
    latest.fake.fail("cuInit", 100)
    with pytest.raises(DeviceError, match="the NVIDIA driver does not work"):
        TrtRunner(path)
    with pytest.raises(DeviceError, match="the NVIDIA driver does not work"):
        Session(path.read_bytes())
    latest.fake.fail("", 0)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(EngineError, match="damaged or replaced"):
        TrtRunner(path)
    assert latest.gone == []  # no runtime was ever made


def test_a_tensorrt_that_does_not_start_says_so(plan, latest, monkeypatch, bindings):
    def refuse(logger):
        logger.log(sys.modules["tensorrt"].ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", refuse)
    with pytest.raises(
        EngineError, match="does not start here .CUDA initialization failure with error: 35.; run: edgedetr doctor"
    ):
        TrtRunner(plan())
