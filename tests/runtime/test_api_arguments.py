"""Wrong arguments from Python are one error that says what was expected; thousands of threads are not started."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgedetr.bundle import ClassInfo, InputContract, OutputContract
from edgedetr.cli import run
from edgedetr.errors import BundleError, DataError, UsageError
from edgedetr.runtime import cpu, load
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.frame_detector import FrameDetector, load_frames
from edgedetr.runtime.postprocess import decode, named
from edgedetr.runtime.predict import frames
from edgedetr.runtime.preprocess import Geometry, prepare

CONTRACT = InputContract(32, 32)
CLASSES = (ClassInfo(0, 1, "a"), ClassInfo(1, 2, "b"))


@pytest.fixture
def detector(make_bundle):
    return load(make_bundle("model.onnx"), backend="onnxruntime", stage="onnx", threads=1)


@pytest.mark.parametrize(
    "images, words",
    [
        (None, "images is None; expected a list"),
        (5, "images is of type int"),
        ("a.jpg", "images is of type str"),
        (Path("a.jpg"), "images is of type PosixPath"),
        (b"bytes", "images is of type bytes"),
        ({}, "images is of type dict"),
        (np.zeros((4, 4, 3), np.uint8), "one image"),
        (["a.jpg"], r"images\[0\] is str; expected a uint8 RGB array"),
        ([Path("a.jpg")], r"images\[0\] is PosixPath"),
        ([None], r"images\[0\] is NoneType"),
        ([[1, 2]], r"images\[0\] is list"),
        (np.zeros(5), r"images\[0\] is float64"),
        (open, "images is of type builtin"),
    ],
)
def test_what_are_no_images_is_a_usage_error_that_says_what_was_given(detector, images, words):
    with pytest.raises(UsageError, match=words):
        detector(images)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_an_array_of_another_kind_is_an_error_with_its_type_and_shape(detector, image):
    with pytest.raises(DataError, match=rf"images\[1\] is {image.dtype} .*expected uint8 RGB \[H, W, 3\]"):
        detector([np.zeros((4, 4, 3), np.uint8), image])


def test_any_iterable_of_images_is_taken_and_none_gives_nothing(detector, red, blue):
    expected = [found.xyxy.tolist() for found in detector([red, blue])]
    assert [found.xyxy.tolist() for found in detector(image for image in (red, blue))] == expected
    assert [found.xyxy.tolist() for found in detector((red, blue))] == expected
    assert len(detector(np.stack([red, red]))) == 2
    assert detector([]) == detector(iter(())) == []


@pytest.mark.parametrize(
    "batch",
    [
        None,
        5,
        "x",
        [],
        [[1.0]],
        np.zeros((0, 3, 32, 48), np.float32),
        np.float32(1),
        np.zeros((1, 3, 32, 48)),
        np.zeros((1, 3, 32, 47), np.float32),
        np.zeros(0, np.float32),
        np.zeros((3, 32, 48), np.float32),
    ],
)
def test_run_raw_takes_a_batch_of_at_least_one(detector, batch):
    with pytest.raises(UsageError, match="batch (is|has no images).*expected"):
        detector.run_raw(batch)


@pytest.mark.parametrize("bundle", [None, 5, b"x", [], object()])
@pytest.mark.parametrize("opens", [load, load_frames])
def test_what_is_no_path_is_no_bundle(bundle, opens):
    with pytest.raises(UsageError, match="bundle is .*; expected the path of a bundle, or an open Bundle"):
        opens(bundle)


@pytest.mark.parametrize("option", ["threads", "batch"])
@pytest.mark.parametrize("value", ["2", 2.0, True, 0, -1, [1], float("nan"), pytest.param(-(10**5000), id="huge")])
def test_a_number_that_is_none_is_a_usage_error(make_bundle, option, value):
    with pytest.raises(UsageError, match=f"{option} is .*; expected a whole number of at least 1"):
        load(make_bundle("model.onnx"), **{option: value})


@pytest.mark.parametrize(
    "option, value",
    [("backend", 5), ("stage", ["onnx"]), ("backend", "onnxruntme"), ("trust", "no"), ("trust", 1), ("trust", None)],
)
def test_a_word_that_is_none_is_a_usage_error(make_bundle, option, value):
    with pytest.raises(UsageError, match=f"{option} is "):
        load(make_bundle("model.onnx"), **{option: value})


UNUSUAL = [
    None,
    -1,
    2.5,
    True,
    b"x",
    {},
    float("nan"),
    np.zeros(3),
    object(),
    [None],
    ("a", "b"),
    [],
    pytest.param(10**5000, id="huge"),
]


@pytest.mark.parametrize("value", ["a.jpg", Path("a.jpg"), None, 5, b"x", {}, [None], [5], (1, 2), np.zeros(2)])
def test_sources_are_a_list_of_paths(value):
    with pytest.raises(UsageError, match="sources.* is .*; expected a"):
        list(frames(value))


@pytest.mark.parametrize("value", UNUSUAL)
def test_options_of_every_entry_are_checked_before_anything_is_done(make_bundle, detector, tmp_path, value):
    from edgedetr.runtime.predict import predict
    from edgedetr.runtime.tensorrt import build
    from edgedetr.runtime.video import play
    from edgedetr.serving.deepstream import write_deepstream
    from edgedetr.serving.frame_graph import write_frames
    from edgedetr.serving.triton import write_repository

    bundle = make_bundle("model.onnx")
    entries = {
        "precision": lambda: build.build(bundle, value),
        "batch": lambda: build.build(bundle, batch=value),
        "typing": lambda: build.build(bundle, typing=value),
        "bundle": lambda: build.build(value),
        "optimization_level": lambda: build.build(bundle, optimization_level=value),
        "frame": lambda: write_frames(bundle, value, 64),
        "source": lambda: list(play(value)),
        "confidence": lambda: list(predict(detector, [], confidence=value)),
        "triton": lambda: write_repository(bundle, tmp_path, value),
        "name": lambda: write_repository(bundle, tmp_path, "model.onnx", name=value) if value is not None else None,
        "instances": lambda: write_repository(bundle, tmp_path, "model.onnx", instances=value),
        "deepstream": lambda: write_deepstream(bundle, tmp_path, value),
    }
    entries |= {
        "frame source": lambda: write_frames(bundle, 64, 64, [value]),
        "prepare": lambda: prepare(value, CONTRACT),
    }
    if isinstance(value, (list, tuple, np.ndarray)):
        del entries["prepare"]  # lists, whose items are looked at
    if value is None:
        for taken in ("instances", "name"):
            del entries[taken]
    for name, call in entries.items():
        with pytest.raises(UsageError, match=" is .*; expected "):
            call()
            pytest.fail(f"{name} took it")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.bundle"]


@pytest.mark.parametrize(
    "logits, boxes",
    [
        *(
            (np.zeros(one), np.zeros(other))
            for one, other in (
                ((1, 5, 2), (1, 3, 4)),
                ((1, 5, 2), (1, 5, 5)),
                ((1, 5, 2), (5, 4)),
                ((2,), (1, 2, 4)),
                ((2, 5, 2), (2, 5, 4)),
                ((1, 5, 3), (1, 5, 4)),
            )
        ),
        (np.zeros((1, 5, 2), bool), np.zeros((1, 5, 4))),
        (np.array("x"), np.zeros((1, 5, 4))),
        (np.zeros((1, 5, 2)), np.full((1, 5, 4), "x")),
    ],
)
def test_a_graph_with_outputs_of_other_shapes_is_one_error(logits, boxes):
    geometry = Geometry.of(32, 32, InputContract(32, 32))
    with pytest.raises(BundleError, match="the graph gives .*run: edgedetr export BUNDLE"):
        decode(RawOutputs(logits, boxes), [geometry], CLASSES, OutputContract())


@pytest.mark.parametrize("classes", [[0, 2], [-1], [10**9]])
def test_a_class_that_the_bundle_lacks_is_one_error(classes):
    count = len(classes)
    with pytest.raises(BundleError, match="and the bundle has 2"):
        named(np.zeros((count, 4), np.float32), np.ones(count, np.float32), np.array(classes), CLASSES)


@pytest.mark.parametrize(
    "boxes, scores, labels", [((3, 4), (2,), (3,)), ((3, 5), (3,), (3,)), ((3,), (3,), (3,)), ((3, 4), (3,), (3, 1))]
)
def test_a_graph_for_frames_with_other_shapes_is_one_error(boxes, scores, labels):
    class Runner:
        name, height, width = "test", 8, 8

        def run(self, frame):
            return {"boxes": np.zeros((1, *boxes)), "scores": np.zeros((1, *scores)), "labels": np.zeros((1, *labels))}

    with pytest.raises(BundleError, match="the graph gives boxes"):
        FrameDetector(Runner(), CLASSES)(np.zeros((8, 8, 3), np.uint8))


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    cpu._warn_bound.cache_clear()


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "wanted, used", [(None, 0), (1, 1), (2, 2), (3, 2), (10_000, 2), pytest.param(10**5000, 2, id="huge")]
)
def test_threads_are_bounded_by_the_cores_and_it_is_said_once(caplog, wanted, used):
    assert cpu.bounded(wanted) == cpu.bounded(wanted) == used
    assert len(caplog.records) == bool(wanted and wanted > 2)
    assert not caplog.records or "this process has 2 cores: 2 are used" in caplog.text


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_ten_thousand_threads_are_not_started(make_bundle, caplog, red, backend):
    pytest.importorskip(backend)

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    detector = load(make_bundle("model.onnx"), backend=backend, stage="onnx", threads=10_000)
    assert len(detector([red])) == 1 and threads() - before < 20
    assert "threads is 10000, and this process has 2 cores: 2 are used" in caplog.text


@pytest.mark.usefixtures("two_cores")
def test_the_command_line_bounds_them_too(make_bundle, tmp_path, capsys, red):
    from PIL import Image

    Image.fromarray(red).save(tmp_path / "a.png")
    words = [str(make_bundle("model.onnx").path), str(tmp_path / "a.png"), "--backend", "onnxruntime"]
    assert run(["predict", *words, "--threads", "10000"]) == 0
    assert "threads is 10000, and this process has 2 cores: 2 are used" in capsys.readouterr().err
    assert run(["predict", *words, "--threads", "0"]) == 2


@pytest.mark.usefixtures("two_cores")
def test_workers_of_a_training_are_bounded(caplog):
    pytest.importorskip("torch")
    from edgedetr.training.data.dataset import batches

    contract = InputContract(32, 32)
    loader = batches([0] * 4, np.zeros((0, 1), int), 0, workers=512, contracts=[contract])
    assert loader._num_workers == 2 and "train.workers is 512, and this process has 2 cores" in caplog.text
