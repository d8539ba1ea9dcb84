"""Engines for real: built, checked, run as CUDA graphs, and equal to ONNX Runtime on the CPU.

TensorRT where it is installed, else TensorRT-RTX: another compiler with the interface of TensorRT 11.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from members import exported, sample_images

from edgedetr.errors import EngineError
from edgedetr.models import FAMILY
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.tensorrt import build, selftest
from edgedetr.runtime.tensorrt.cudart import Cuda
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.trt_runner import Session


@pytest.fixture
def session(trt, gpu):
    """A session on the engine of an ONNX file; skips where this library does not take the chip."""
    opened = []

    def start(path: Path, batch: tuple[int, int, int] = (1, 1, 1), precision: str = "fp32") -> Session:
        arguments = BuildArguments(precision, batch, 1024, 3, "strong")
        try:
            plan = build.build_serialized(path.read_bytes(), arguments, gpu)
        except EngineError as error:
            if "TensorRT-RTX does not support this compute capability" in str(error):
                pytest.skip(f"TensorRT-RTX {trt.__version__} does not take this chip: {error}")
            raise
        opened.append(Session(plan.data, cuda=Cuda(gpu)))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def run(session: Session, images: object) -> RawOutputs:
    found = session.run({"images": images})
    return RawOutputs(found["logits"], found["boxes"])


@pytest.mark.parametrize("name", FAMILY)
def test_the_engine_of_a_member_detects_what_onnx_runtime_detects(name, session):
    path, images = exported(name, 1), sample_images(1).numpy()
    expected, engine = OrtRunner(path).run(images), session(path)
    for turn in range(3):  # plainly, then recorded, then as a graph
        found = run(engine, images)
        np.testing.assert_allclose(found.logits, expected.logits, atol=2e-3, rtol=0, err_msg=f"run {turn}")
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-4, rtol=0, err_msg=f"run {turn}")
    assert engine.graphs == 1


def test_an_open_batch_takes_every_size_and_equal_images_give_equal_detections(session):
    path, images = exported("rt_detr", None), sample_images(4).numpy()
    images[2] = images[0]
    engine, runner = session(path, (1, 2, 4)), OrtRunner(path)
    for count in (1, 4, 2, 3):
        found, expected = run(engine, images[:count]), runner.run(images[:count])
        np.testing.assert_allclose(found.logits, expected.logits, atol=2e-3, rtol=0)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-4, rtol=0)
    whole = run(engine, images)
    np.testing.assert_allclose(whole.boxes[2], whole.boxes[0], atol=1e-5, rtol=0)


def test_images_on_the_gpu_are_read_from_there(session, cuda):
    path, images = exported("rt_detr", 1), sample_images(1)
    engine = session(path)
    there = images.to(cuda)
    torch.cuda.synchronize()
    found, expected = run(engine, there), run(engine, images.numpy())
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_threads_have_contexts_of_their_own(session):
    path = exported("rt_detr", 1)
    engine, images = session(path), [sample_images(1).numpy() + shift for shift in range(4)]
    expected = [run(engine, image).logits for image in images]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(run(engine, images[number]).logits, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_self_test_models_are_right_here(trt, gpu, session):
    session(exported("detr", 1))  # skips where the chip is not taken
    found = selftest.selftest()
    assert found.passed, [outcome.note for outcome in found.outcomes if not outcome.passed]
