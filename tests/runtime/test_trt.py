"""The runner on a fake TensorRT that has the names of 10.3, 10.16 and 11.4 and computes with ONNX Runtime."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass

import fake_cuda
import fake_tensorrt
import frame_graph
import numpy as np
import onnx
import pytest

from edgedetr.errors import DeviceError, EngineError, UsageError
from edgedetr.runtime import sidecar
from edgedetr.runtime.cudart import Cuda
from edgedetr.runtime.ort import OrtFrameRunner, OrtRunner
from edgedetr.runtime.trt import DTYPES, Session, TrtFrameRunner, TrtRunner


@pytest.fixture
def fake(monkeypatch):
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def behaviour(monkeypatch, trt, fake):
    """A fake TensorRT of each version in turn."""
    return fake_tensorrt.install(monkeypatch, trt, fake)


@pytest.fixture
def latest(monkeypatch, bindings, fake):
    """A fake TensorRT of one version, for what does not depend on names."""
    return fake_tensorrt.install(monkeypatch, bindings.module("10.3.0"), fake)


@pytest.fixture
def graph(tmp_path, tiny_graph):
    def write(batch=1):
        path, weights = tmp_path / f"model-{batch}.onnx", np.random.default_rng(7)
        tiny_graph.write(path, weights.standard_normal((3, 6)), weights.standard_normal((3, 2)), batch=batch)
        return path

    return write


@pytest.fixture
def plan(graph, fake):
    """A plan with the sidecar that `edgedetr build` leaves; batch 1, 4 or "n"."""

    def write(batch=1):
        return fake_tensorrt.write_plan(graph(batch), batch=(1, 2, 4) if batch == "n" else batch)

    return write


def pictures(rng, n=1):
    return rng.integers(0, 256, (n, 3, 32, 48)).astype(np.float32)


def agree(raw, oracle):
    # the fake computes with the same library on the same bytes: nothing may differ
    np.testing.assert_array_equal(raw.logits, oracle.logits)
    np.testing.assert_array_equal(raw.boxes, oracle.boxes)


@pytest.mark.parametrize("integrated", [False, True], ids=["copies", "shared memory"])
def test_an_engine_computes_its_graph_and_from_the_second_run_as_a_cuda_graph(plan, graph, behaviour, rng, integrated):
    behaviour.fake.device(integrated=integrated)
    runner, oracle = TrtRunner(plan()), OrtRunner(graph(), threads=1)
    assert (runner.name, runner.batch, runner.height, runner.width) == ("tensorrt", 1, 32, 48)
    for run in range(4):
        images = pictures(rng)
        agree(runner.run(images), oracle.run(images))
        assert runner.session.graphs == (run > 0)
    assert behaviour.fake.log.count("cudaGraphInstantiate") == 1
    assert behaviour.fake.log.count("cudaGraphLaunch") == 3
    assert ("cudaMemcpyAsync" in behaviour.fake.log) is not integrated      # on a Jetson no byte is copied
    assert (behaviour.fake.live()["device"] == 0) is integrated
    runner.close()
    assert not any(behaviour.fake.live().values())


def test_contexts_go_before_the_engine_and_the_engine_before_the_runtime(plan, behaviour, rng):
    with TrtRunner(plan()).session as session:
        session.run({"images": pictures(rng)})
    assert behaviour.gone == ["context", "engine", "runtime"]
    with pytest.raises(UsageError, match="has been closed"):
        session.run({"images": pictures(rng)})


@pytest.mark.parametrize("reason", ["TensorRT refuses", "CUDA refuses to record", "CUDA refuses a graph", "not asked"])
def test_without_a_graph_the_engine_is_queued_plainly(plan, graph, latest, rng, reason, caplog):
    if reason == "TensorRT refuses":
        latest.refuse = {"capture"}
    elif reason != "not asked":
        latest.fake.fail("cudaStreamEndCapture" if "record" in reason else "cudaGraphInstantiate",
                         900 if "record" in reason else 801)
    runner, oracle = TrtRunner(plan(), use_graph=reason != "not asked"), OrtRunner(graph(), threads=1)
    for _ in range(3):
        images = pictures(rng)
        agree(runner.run(images), oracle.run(images))
    assert runner.session.graphs == 0
    assert latest.fake.log.count("cudaStreamBeginCapture") == (reason != "not asked")      # tried once, not each time
    assert ("no CUDA graph" in caplog.text) == (reason != "not asked")
    assert latest.fake.live()["graphs"] == 0


def test_fewer_pictures_than_a_fixed_batch_are_filled_up_and_cut(plan, graph, latest, rng):
    runner, oracle = TrtRunner(plan(4)), OrtRunner(graph(1), threads=1)
    assert runner.batch == 4
    for n in (1, 4, 3, 6):
        images = pictures(rng, n)
        raw = runner.run(images)
        assert raw.logits.shape == (n, 3, 2) and raw.boxes.shape == (n, 3, 4)
        for row, image in enumerate(images):
            # float32 sums over 1536 pixels in another order per batch size; measured 1e-6
            np.testing.assert_allclose(raw.logits[row], oracle.run(image[None]).logits[0], atol=1e-5)


def test_an_open_batch_takes_any_size_and_records_anew_for_each(plan, graph, latest, rng):
    runner, oracle = TrtRunner(plan("n")), OrtRunner(graph("n"), threads=1)
    assert runner.batch is None and runner.largest_batch == 4
    for n in (2, 2, 2, 3, 3, 1, 1):
        images = pictures(rng, n)
        agree(runner.run(images), oracle.run(images))
    assert latest.fake.log.count("cudaGraphInstantiate") == 3
    assert latest.fake.live()["graphs"] == 1                    # the graph of the last shape
    assert len(runner.run(pictures(rng, 9)).logits) == 9        # in parts of 4


def test_every_thread_has_a_context_a_stream_and_buffers_of_its_own(plan, graph, latest, rng):
    runner, oracle = TrtRunner(plan()), OrtRunner(graph(), threads=1)
    wrong: list[str] = []
    # The fake's own queues are not made for threads, so each run holds this; what is shared would still be mixed up.
    turn = threading.Lock()

    def work(seed):
        own = np.random.default_rng(seed)
        for _ in range(5):
            images = pictures(own)
            with turn:
                raw = runner.run(images)
            if not np.array_equal(raw.logits, oracle.run(images).logits):
                wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert latest.contexts == 3 and latest.fake.live()["streams"] == 3
    runner.close()
    assert not any(latest.fake.live().values())
    assert latest.gone == ["context"] * 3 + ["engine", "runtime"]


def test_results_are_copies_that_the_next_run_does_not_change(plan, latest, rng):
    runner = TrtRunner(plan())
    first = runner.run(pictures(rng))
    before = first.logits.copy()
    runner.run(pictures(rng))
    np.testing.assert_array_equal(first.logits, before)


@dataclass
class OnDevice:
    """What PyTorch or CuPy would hand over: memory of the device and how to read it."""

    array: np.ndarray
    address: int
    typestr: str = "<f4"
    strides: tuple[int, ...] | None = None
    stream: int | None = 1

    @property
    def shape(self):
        return self.array.shape

    dtype = "torch.float32"

    @property
    def __cuda_array_interface__(self):
        told = {"shape": self.shape, "typestr": self.typestr, "data": (self.address, False), "version": 3,
                "strides": self.strides}
        return told if self.stream is None and not self.strides else {**told, "stream": self.stream}


def test_pictures_that_are_on_the_device_stay_there(plan, graph, latest, rng):
    runner, oracle, cuda = TrtRunner(plan()), OrtRunner(graph(), threads=1), Cuda()
    for stream, strides in ((1, None), (2, (18432, 6144, 192, 4)), (cuda.stream(), (7, 6144, 192, 4))):
        images = pictures(rng)
        address = cuda.allocate(images.nbytes)
        fake_cuda.at(address, images.shape)[...] = images
        before = latest.fake.log.count("cudaMemcpyAsync")
        agree(runner.run(OnDevice(images, address, stream=stream, strides=strides)), oracle.run(images))
        assert latest.fake.log.count("cudaMemcpyAsync") - before == 3       # device to device, and two outputs back


def test_a_producer_that_still_works_on_its_stream_is_waited_for(plan, graph, latest, rng):
    runner, oracle, cuda = TrtRunner(plan()), OrtRunner(graph(), threads=1), Cuda()
    images, theirs = pictures(rng), cuda.stream()
    address, source = cuda.allocate(images.nbytes), cuda.allocate_host(images.nbytes)
    fake_cuda.at(source, images.shape)[...] = images
    cuda.copy(address, source, images.nbytes, theirs)       # queued by the producer, not done
    agree(runner.run(OnDevice(images, address, stream=theirs)), oracle.run(images))


@pytest.mark.parametrize("odd", [{"typestr": "<f2"}, {"strides": (4, 8, 16, 32)}])
def test_device_arrays_of_another_type_or_order_are_refused(plan, latest, rng, odd):
    images = pictures(rng)
    with pytest.raises(UsageError, match="expected float32 in C order"):
        TrtRunner(plan()).run(OnDevice(images, Cuda().allocate(images.nbytes), **odd))


@pytest.mark.parametrize("images, what", [
    (np.zeros((1, 3, 32, 40), np.float32), r"float32 \[1, 3, 32, 40\]"),
    (np.zeros((1, 3, 32, 48)), "float64"),
    (np.zeros((3, 32, 48), np.float32), r"\[3, 32, 48\]"),
])
def test_arrays_that_the_engine_does_not_take_are_refused_before_any_copy(plan, latest, images, what):
    runner = TrtRunner(plan())
    with pytest.raises(UsageError, match=f"images is .*{what}.* takes float32 .1, 3, 32, 48."):
        runner.session.run({"images": images})
    with pytest.raises(UsageError, match=r"takes \['images'\], given were \['pictures'\]"):
        runner.session.run({"pictures": images})
    assert "cudaMemcpyAsync" not in latest.fake.log


@pytest.mark.parametrize("call, error", [
    ("deserialize", "cannot deserialise it .Internal error: a reason.; build it here"),
    ("context", "no execution context .Internal error: a reason"),
    ("set_input_shape", "TensorRT failed at input images of .1, 3, 32, 48.: Internal error: a reason"),
    ("infer_shapes", "TensorRT failed at inferring shapes: Internal error: a reason"),
    ("set_tensor_address", "TensorRT failed at the address of images: Internal error: a reason"),
    ("execute", "TensorRT failed at queueing the engine: Internal error: a reason"),
])
@pytest.mark.parametrize("report", ["Internal error: a reason", ""])
def test_what_tensorrt_refuses_is_said_with_its_own_words_and_nothing_stays_allocated(plan, latest, rng, call, error,
                                                                                      report):
    latest.refuse, latest.report = {call}, report
    if not report:
        error = error.replace("Internal error: a reason", "(no reason given|probably too little memory)")
    with pytest.raises(EngineError, match=error):
        runner = TrtRunner(plan())
        try:
            runner.run(pictures(rng))
        finally:
            runner.close()
    assert not any(latest.fake.live().values())


def test_an_error_that_the_recorder_was_told_while_running_is_not_lost(plan, latest, rng):
    runner = TrtRunner(plan())
    runner.run(pictures(rng))
    runner.session._lanes[0].errors.report_error(7, " Cask: an asynchronous failure ")
    with pytest.raises(EngineError, match="reported at running the engine: Cask: an asynchronous failure"):
        runner.run(pictures(rng))
    runner.run(pictures(rng))                                   # told once


def test_the_recorder_speaks_the_protocol_of_tensorrt(plan, behaviour):
    recorder = TrtRunner(plan()).session._errors
    recorder.report_error("code", " text ")
    assert (recorder.num_errors(), recorder.get_error_code(0), recorder.get_error_desc(0)) == (1, "code", "text")
    assert not recorder.has_overflowed()
    recorder.clear()
    assert recorder.num_errors() == 0


def test_a_device_without_memory_says_so_and_keeps_nothing(plan, latest, rng):
    runner = TrtRunner(plan())
    latest.fake.fail("cudaMalloc", 2, after=1)                  # the second buffer does not fit
    with pytest.raises(DeviceError, match="Orin is out of memory: a buffer of"):
        runner.run(pictures(rng))
    runner.close()
    assert not any(latest.fake.live().values())


@pytest.mark.parametrize("change, error", [
    ({"location": "HOST"}, "must lie in host memory"), ({"layout": "CHW4"}, "has the layout CHW4; expected LINEAR"),
    ({"kinds": {"logits": "BF16"}}, "tensor logits is BF16, which numpy does not have; expected one of FLOAT, HALF"),
    ({"kinds": {"images": "HALF"}}, "images is float16 .1, 3, 32, 48.; expected float32 .B, 3, H, W."),
])
def test_engines_with_odd_tensors_are_refused(plan, latest, change, error):
    for name, value in change.items():
        setattr(latest, name, value)
    with pytest.raises(EngineError, match=error):
        TrtRunner(plan())
    assert latest.gone == ["engine", "runtime"]


def test_outputs_in_half_precision_come_back_as_float32(plan, latest, rng):
    path = plan()
    graph = onnx.load(path)
    for name in ("logits", "boxes"):
        node = next(n for n in graph.graph.node if name in n.output)
        node.output[0] = f"{name}_full"
        for other in graph.graph.node:
            other.input[:] = [f"{name}_full" if word == name else word for word in other.input]
        graph.graph.node.append(onnx.helper.make_node("Cast", [f"{name}_full"], [name], to=onnx.TensorProto.FLOAT16))
        next(o for o in graph.graph.output if o.name == name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    images = pictures(rng)
    expected = TrtRunner(path).run(images)
    sidecar.beside(path).unlink()
    path.write_bytes(graph.SerializeToString())
    half = TrtRunner(path, trust=True)
    assert half.session.ports["logits"].dtype == np.float16
    raw = half.run(images)
    assert raw.logits.dtype == raw.boxes.dtype == np.float32
    np.testing.assert_array_equal(raw.logits, expected.logits.astype(np.float16).astype(np.float32))


def test_an_output_whose_shape_depends_on_the_data_is_refused(plan, latest, rng):
    latest.open_output = True
    runner = TrtRunner(plan())
    with pytest.raises(EngineError, match="tensor boxes has the shape .-1, 3, 4., which depends on the data"):
        runner.run(pictures(rng))


def test_an_engine_of_another_contract_is_refused(plan, latest, tmp_path, tiny_graph, monkeypatch):
    path = plan()
    tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)), names=("points", "boxes"))
    (sidecar.beside(path)).unlink()
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
    assert latest.gone == []                                    # no runtime was ever made


def test_a_tensorrt_that_does_not_start_says_so(plan, latest, monkeypatch, bindings):
    def refuse(logger):
        logger.log(sys.modules["tensorrt"].ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", refuse)
    with pytest.raises(EngineError, match="does not start here .CUDA initialization failure with error: 35.; run: "
                                          "edgedetr doctor"):
        TrtRunner(plan())


def test_frames_stay_bytes_on_their_way_to_the_device(behaviour, tmp_path, rng):
    path = tmp_path / "model.frame-24x40.onnx"
    frame_graph.write(path)
    frame = rng.integers(0, 256, (1, 24, 40, 3), dtype=np.uint8)
    runner, oracle = TrtFrameRunner(fake_tensorrt.write_plan(path)), OrtFrameRunner(path, threads=1)
    assert (runner.height, runner.width) == (24, 40)
    for _ in range(2):
        found, expected = runner.run(frame), oracle.run(frame)
        assert {name: value.dtype for name, value in found.items()} == {
            "boxes": np.float32, "scores": np.float32, "labels": np.int64}
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    with pytest.raises(UsageError, match="frames is float32 .1, 24, 40, 3.; .* takes uint8"):
        runner.run(frame.astype(np.float32))
    runner.close()
    assert not any(behaviour.fake.live().values())


def test_types_that_numpy_lacks_are_named(bindings):
    kinds = {member.name for member in bindings.module("11.4.0").DataType}
    assert set(DTYPES) <= kinds
    assert kinds - set(DTYPES) == {"BF16", "FP8", "INT4", "FP4", "E8M0"}
