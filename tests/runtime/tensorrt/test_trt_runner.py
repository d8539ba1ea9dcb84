"""The runner on a fake TensorRT that has the names of 10.3, 10.16 and 11.4 and computes with ONNX Runtime."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import fake_cuda
import fake_tensorrt
import frame_graph
import numpy as np
import onnx
import pytest
from engine_outputs import assert_equal_outputs, random_images

from edgedetr.errors import UsageError
from edgedetr.runtime.backends.onnxruntime import OrtFrameRunner, OrtRunner
from edgedetr.runtime.tensorrt import engine_metadata
from edgedetr.runtime.tensorrt.cudart import Cuda
from edgedetr.runtime.tensorrt.trt_runner import DTYPES, TrtFrameRunner, TrtRunner


@pytest.mark.parametrize("integrated", [False, True], ids=["copies", "shared memory"])
def test_an_engine_computes_its_graph_and_from_the_second_run_as_a_cuda_graph(plan, graph, behavior, rng, integrated):
    behavior.fake.device(integrated=integrated)
    runner, reference = TrtRunner(plan()), OrtRunner(graph(), threads=1)
    assert (runner.name, runner.batch, runner.height, runner.width) == ("tensorrt", 1, 32, 48)
    for run in range(4):
        images = random_images(rng)
        assert_equal_outputs(runner.run(images), reference.run(images))
        assert runner.session.graphs == (run > 0)
    assert behavior.fake.log.count("cudaGraphInstantiate") == 1
    assert behavior.fake.log.count("cudaGraphLaunch") == 3
    assert ("cudaMemcpyAsync" in behavior.fake.log) is not integrated  # on a Jetson no byte is copied
    assert (behavior.fake.live()["device"] == 0) is integrated
    runner.close()
    assert not any(behavior.fake.live().values())


def test_contexts_go_before_the_engine_and_the_engine_before_the_runtime(plan, behavior, rng):
    with TrtRunner(plan()).session as session:
        session.run({"images": random_images(rng)})
    assert behavior.gone == ["context", "engine", "runtime"]
    with pytest.raises(UsageError, match="has been closed"):
        session.run({"images": random_images(rng)})


@pytest.mark.parametrize("reason", ["TensorRT refuses", "CUDA refuses to record", "CUDA refuses a graph", "not asked"])
def test_without_a_graph_the_engine_is_queued_plainly(plan, graph, latest, rng, reason, caplog):
    if reason == "TensorRT refuses":
        latest.refuse = {"capture"}
    elif reason != "not asked":
        latest.fake.fail(
            "cudaStreamEndCapture" if "record" in reason else "cudaGraphInstantiate", 900 if "record" in reason else 801
        )
    runner, reference = TrtRunner(plan(), use_graph=reason != "not asked"), OrtRunner(graph(), threads=1)
    for _ in range(3):
        images = random_images(rng)
        assert_equal_outputs(runner.run(images), reference.run(images))
    assert runner.session.graphs == 0
    assert latest.fake.log.count("cudaStreamBeginCapture") == (reason != "not asked")  # tried once, not each time
    assert ("no CUDA graph" in caplog.text) == (reason != "not asked")
    assert latest.fake.live()["graphs"] == 0


def test_fewer_images_than_a_fixed_batch_are_filled_up_and_cut(plan, graph, latest, rng):
    runner, reference = TrtRunner(plan(4)), OrtRunner(graph(1), threads=1)
    assert runner.batch == 4
    for n in (1, 4, 3, 6):
        images = random_images(rng, n)
        raw = runner.run(images)
        assert raw.logits.shape == (n, 3, 2) and raw.boxes.shape == (n, 3, 4)
        for row, image in enumerate(images):
            # float32 sums over 1536 pixels in another order per batch size; measured 1e-6
            np.testing.assert_allclose(raw.logits[row], reference.run(image[None]).logits[0], atol=1e-5)


def test_an_open_batch_takes_any_size_and_records_anew_for_each(plan, graph, latest, rng):
    runner, reference = TrtRunner(plan("n")), OrtRunner(graph("n"), threads=1)
    assert runner.batch is None and runner.largest_batch == 4
    for n in (2, 2, 2, 3, 3, 1, 1):
        images = random_images(rng, n)
        assert_equal_outputs(runner.run(images), reference.run(images))
    assert latest.fake.log.count("cudaGraphInstantiate") == 3
    assert latest.fake.live()["graphs"] == 1  # the graph of the last shape
    assert len(runner.run(random_images(rng, 9)).logits) == 9  # in parts of 4


def test_every_thread_has_a_context_a_stream_and_buffers_of_its_own(plan, graph, latest, rng):
    runner, reference = TrtRunner(plan()), OrtRunner(graph(), threads=1)
    wrong: list[str] = []
    # The fake's own queues are not made for threads, so each run holds this; what is shared would still be mixed up.
    turn = threading.Lock()

    def work(seed):
        own = np.random.default_rng(seed)
        for _ in range(5):
            images = random_images(own)
            with turn:
                raw = runner.run(images)
            if not np.array_equal(raw.logits, reference.run(images).logits):
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


def test_an_engine_that_was_closed_before_it_ran_says_so_and_closing_again_changes_nothing(plan, latest, rng):
    runner = TrtRunner(plan())
    runner.run(random_images(rng))
    slot = runner.session._slots[0]
    for _ in range(2):
        slot.close()
        runner.close()
    assert not any(latest.fake.live().values())
    other = TrtRunner(plan())
    other.close()
    with pytest.raises(UsageError, match="has been closed"):
        other.run(random_images(rng))


def test_results_are_copies_that_the_next_run_does_not_change(plan, latest, rng):
    runner = TrtRunner(plan())
    first = runner.run(random_images(rng))
    before = first.logits.copy()
    runner.run(random_images(rng))
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
        interface = {
            "shape": self.shape,
            "typestr": self.typestr,
            "data": (self.address, False),
            "version": 3,
            "strides": self.strides,
        }
        return interface if self.stream is None and not self.strides else {**interface, "stream": self.stream}


def test_images_that_are_on_the_device_stay_there(plan, graph, latest, rng):
    runner, reference, cuda = TrtRunner(plan()), OrtRunner(graph(), threads=1), Cuda()
    for stream, strides in ((1, None), (2, (18432, 6144, 192, 4)), (cuda.stream(), (7, 6144, 192, 4))):
        images = random_images(rng)
        address = cuda.allocate(images.nbytes)
        fake_cuda.at(address, images.shape)[...] = images
        before = latest.fake.log.count("cudaMemcpyAsync")
        assert_equal_outputs(
            runner.run(OnDevice(images, address, stream=stream, strides=strides)), reference.run(images)
        )
        assert latest.fake.log.count("cudaMemcpyAsync") - before == 3  # device to device, and two outputs back


def test_a_producer_that_still_works_on_its_stream_is_waited_for(plan, graph, latest, rng):
    runner, reference, cuda = TrtRunner(plan()), OrtRunner(graph(), threads=1), Cuda()
    images, theirs = random_images(rng), cuda.stream()
    address, source = cuda.allocate(images.nbytes), cuda.allocate_host(images.nbytes)
    fake_cuda.at(source, images.shape)[...] = images
    cuda.copy(address, source, images.nbytes, theirs)  # queued by the producer, not done
    assert_equal_outputs(runner.run(OnDevice(images, address, stream=theirs)), reference.run(images))


@pytest.mark.parametrize("change", [{"typestr": "<f2"}, {"strides": (4, 8, 16, 32)}])
def test_device_arrays_of_another_type_or_order_are_refused(plan, latest, rng, change):
    images = random_images(rng)
    with pytest.raises(UsageError, match="expected float32 in C order"):
        TrtRunner(plan()).run(OnDevice(images, Cuda().allocate(images.nbytes), **change))


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
    images = random_images(rng)
    expected = TrtRunner(path).run(images)
    engine_metadata.metadata_path(path).unlink()
    path.write_bytes(graph.SerializeToString())
    fp16_runner = TrtRunner(path, trust=True)
    assert fp16_runner.session.tensors["logits"].dtype == np.float16
    raw = fp16_runner.run(images)
    assert raw.logits.dtype == raw.boxes.dtype == np.float32
    np.testing.assert_array_equal(raw.logits, expected.logits.astype(np.float16).astype(np.float32))


def test_frames_stay_bytes_on_their_way_to_the_device(behavior, tmp_path, rng):
    path = tmp_path / "model.frame-24x40.onnx"
    frame_graph.write(path)
    frame = rng.integers(0, 256, (1, 24, 40, 3), dtype=np.uint8)
    runner, reference = TrtFrameRunner(fake_tensorrt.write_plan(path)), OrtFrameRunner(path, threads=1)
    assert (runner.height, runner.width) == (24, 40)
    for _ in range(2):
        found, expected = runner.run(frame), reference.run(frame)
        assert {name: value.dtype for name, value in found.items()} == {
            "boxes": np.float32,
            "scores": np.float32,
            "labels": np.int64,
        }
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    with pytest.raises(UsageError, match="frames is float32 .1, 24, 40, 3.; .* takes uint8"):
        runner.run(frame.astype(np.float32))
    runner.close()
    assert not any(behavior.fake.live().values())


def test_types_that_numpy_lacks_are_named(bindings):
    kinds = {member.name for member in bindings.module("11.4.0").DataType}
    assert set(DTYPES) <= kinds
    assert kinds - set(DTYPES) == {"BF16", "FP8", "INT4", "FP4", "E8M0"}
