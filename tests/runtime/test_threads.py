"""One detector shared by eight threads gives each image its own detections, on every backend that runs here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.runtime import Detector, load
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.backends.openvino import OpenVinoRunner
from edgedetr.runtime.preprocess import prepare
from edgedetr.runtime.tensorrt.trt_runner import TrtRunner

THREADS, IMAGES, SIDE = 8, 80, 64


def slow_graph(path: Path) -> None:
    """A box that depends on the image, behind convolutions that take long enough for threads to meet."""
    rng = np.random.default_rng(0)
    values = {
        "w1": rng.standard_normal((16, 3, 3, 3)) / 999,
        "w2": rng.standard_normal((16, 16, 3, 3)) / 12,
        "head": rng.standard_normal((16, 12)),
        "logit_shape": np.array([-1, 2, 2]),
        "box_shape": np.array([-1, 2, 4]),
        "flat": np.array([-1, 16]),
        "sizes": np.array([4, 8]),
    }
    nodes = [
        ("Conv", ["images", "w1"], ["a"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["a"], ["b"], {}),
        ("Conv", ["b", "w2"], ["c"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c"], ["d"], {}),
        ("GlobalAveragePool", ["d"], ["e"], {}),
        ("Reshape", ["e", "flat"], ["f"], {}),
        ("MatMul", ["f", "head"], ["g"], {}),
        ("Sigmoid", ["g"], ["h"], {}),
        ("Split", ["h", "sizes"], ["i", "j"], {"axis": 1}),
        ("Reshape", ["i", "logit_shape"], ["logits"], {}),
        ("Reshape", ["j", "box_shape"], ["boxes"], {}),
    ]
    value = helper.make_tensor_value_info
    constants = [
        numpy_helper.from_array(array.astype(np.float32) if array.dtype.kind == "f" else array, name)
        for name, array in values.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, given, made, **attributes) for kind, given, made, attributes in nodes],
        "slow",
        [value("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [value("logits", TensorProto.FLOAT, [1, 2, 2]), value("boxes", TensorProto.FLOAT, [1, 2, 4])],
        constants,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Detector]:
    bundle = Bundle.create(
        tmp_path_factory.mktemp("threads") / "b.bundle",
        Manifest(
            "t", (ClassInfo(0, 1, "a"), ClassInfo(1, 2, "b")), InputContract(SIDE, SIDE, "letterbox"), OutputContract()
        ),
    )
    with bundle.add("model.onnx", stage="export") as path:
        slow_graph(path)
    return lambda backend, opened=True: load(bundle, backend=backend, stage="onnx", threads=1) if opened else bundle


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Of four sizes, so that threads also meet in the tables of the resize and in the letterbox."""
    rng = np.random.default_rng(1)
    sizes = [(96, 96), (60, 200), (250, 96), (64, 48)]
    return [
        np.clip(rng.integers(0, 256, 3) + rng.integers(-40, 40, (*sizes[i % 4], 3)), 0, 255).astype(np.uint8)
        for i in range(IMAGES)
    ]


def wrong(call: Callable[[int], tuple[np.ndarray, ...]], number: int = IMAGES) -> int:
    """How many of 8 x 80 answers are not the single thread's, each thread beginning at its own image."""
    alone = [tuple(array.copy() for array in call(i)) for i in range(number)]
    assert len({answer[0].tobytes() for answer in alone}) == number, "the answers cannot be distinguished"

    def work(thread: int) -> int:
        order = [(i + 10 * thread) % number for i in range(number)]
        found = [call(i) for i in order]  # all are kept: a buffer that is used again would show
        return sum(not all(np.array_equal(a, b) for a, b in zip(one, alone[i])) for i, one in zip(order, found))

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_eight_threads_share_a_detector(detectors, images, backend):
    pytest.importorskip(backend)
    detector = detectors(backend)

    def call(i: int) -> tuple[np.ndarray, ...]:
        found = detector([images[i]])[0]
        return found.xyxy, found.confidence, found.class_id

    assert wrong(call) == 0


def test_eight_threads_share_an_engine(plan, cuda, latest):
    images = np.random.default_rng(2).integers(0, 256, (IMAGES, 1, 3, 32, 48)).astype(np.float32)
    with TrtRunner(plan(1)).session as session:

        def call(i: int) -> tuple[np.ndarray, ...]:
            found = session.run({"images": images[i]})
            return found["logits"], found["boxes"]

        assert wrong(call) == 0
    assert not any(cuda.live().values())


def test_eight_threads_share_a_detector_of_whole_frames(detectors):
    from edgedetr.runtime.frame_detector import load_frames
    from edgedetr.serving.frame_graph import write_frames

    bundle = detectors("onnxruntime", opened=False)
    write_frames(bundle, 40, 60)
    detector = load_frames(bundle, threads=1)
    frames = np.random.default_rng(3).integers(0, 200, (IMAGES, 1, 1, 3)) + np.zeros((1, 40, 60, 1), int)

    def call(i: int) -> tuple[np.ndarray, ...]:
        found = detector(frames[i].astype(np.uint8))
        return found.xyxy, found.confidence, found.class_id

    assert wrong(call) == 0


def test_eight_threads_prepare_images(images):
    contract = InputContract(64, 64, "letterbox")
    assert wrong(lambda i: (prepare([images[i]], contract, backend="numpy")[0],)) == 0


@pytest.mark.parametrize("runner", [OrtRunner, OpenVinoRunner])
def test_an_answer_stays_what_it_was_when_the_next_image_comes(detectors, make_bundle, runner):
    first, second = np.full((1, 3, 32, 48), 9, np.float32), np.full((1, 3, 32, 48), 200, np.float32)
    opened = runner(make_bundle("model.onnx").path / "model.onnx")
    answer = opened.run(first)
    kept = answer.logits.copy()
    opened.run(second)
    assert np.array_equal(answer.logits, kept)
