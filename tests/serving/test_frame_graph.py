"""Graphs for whole frames: the CPU's resize and the CPU's choice of objects, on images, against the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import patch_detector
import pytest
from onnx import TensorProto, helper, numpy_helper
from patch_detector import smooth

from edgedetr.bundle import Bundle, InputContract
from edgedetr.data.images import decode
from edgedetr.errors import BundleError, DataError, ExportError, ModelError, UsageError
from edgedetr.evaluation.agreement import detections_allclose
from edgedetr.runtime import load
from edgedetr.runtime.frame_detector import FrameDetector, load_frames
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.preprocess import prepare
from edgedetr.serving.frame_graph import check, with_frames, write_frames

CONTRACTS = [InputContract(64, 96), InputContract(96, 64, "letterbox")]
SIZES = [(64, 96), (1, 1), (2, 300), (65, 97), (130, 191), (129, 193), (300, 500), (411, 90)]


def inside(model: onnx.ModelProto, frame: np.ndarray, *names: str) -> list[np.ndarray]:
    """Values of tensors inside the graph, for one frame."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(names), {"frames": frame[None]})


def within(frame: np.ndarray) -> dict[str, float]:
    """OpenCV rounds twice and the graph once: up to a level of 255 at a pixel, a tenth of one in the mean.

    That moved a score by up to 2.3e-4, and a side of a box by up to 9.3e-4 of the frame.
    """
    return {"pixels": 2e-3 * max(frame.shape), "score": 1e-3}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.resize)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_resize_in_the_graph_equals_the_cpus_within_one_level(tmp_path, contract, size):
    made = patch_detector.bundle(tmp_path / "b", contract=contract)
    model = with_frames(onnx.load(made.path / "model.onnx"), made.manifest, *size)
    frame = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    images = inside(model, frame, "images")[0]
    for backend in ("numpy", "opencv"):
        expected = prepare([frame], contract, backend=backend)[0]
        assert images.shape == expected.shape
        assert np.abs(images - expected).max() <= 1  # ties between two levels round either way; measured 1


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.resize)
@pytest.mark.parametrize("activation, classes", [("sigmoid", 3), ("sigmoid", 1), ("softmax", 3), ("softmax", 1)])
@pytest.mark.parametrize("top_k", [5, 100])
def test_detections_are_those_of_the_cpu(tmp_path, contract, activation, classes, top_k):
    made = patch_detector.bundle(tmp_path / "b", contract=contract, activation=activation, classes=classes, top_k=top_k)
    write_frames(made, 130, 191)
    detector = load(made, backend="onnxruntime", stage="onnx")
    of_frames = load_frames(made)
    found = 0
    for seed in range(4):
        frame = smooth((130, 191), seed)
        expected, actual = detector([frame])[0], of_frames(frame)
        assert detections_allclose(actual, expected, **within(frame))
        assert actual.xyxy.dtype == np.float32
        assert set(actual.data["category_id"]) <= {10 - c for c in actual.class_id}
        assert [str(name) for name in actual.data["class_name"]] == [f"class; {c}" for c in actual.class_id]
        found += len(actual)
    assert found == 4 * min(top_k, 16 * (classes if activation == "sigmoid" else 1))


@pytest.mark.parametrize(
    "contract", [InputContract(320, 320), InputContract(320, 416, "letterbox")], ids=lambda contract: contract.resize
)
@pytest.mark.parametrize("file", ["sahi/small-vehicles1.jpeg", "exif/Landscape_6.jpg", "pillow/hopper.png"])
def test_real_images_give_the_same_detections(tmp_path, shared_data, contract, file):
    frame = decode(shared_data / "edge" / file)
    made = patch_detector.bundle(tmp_path / "b", contract=contract)
    write_frames(made, *frame.shape[:2])
    expected = load(made, backend="onnxruntime", stage="onnx")([frame])[0]
    assert detections_allclose(load_frames(made)(frame), expected, **within(frame))


def test_boxes_are_pixels_of_the_frame_and_end_at_its_border(tmp_path):
    """By hand: the whole input in a letterbox of 100 x 50 (stretched by 0.64) is the frame and the gray below it."""
    made = patch_detector.bundle(tmp_path / "b", contract=InputContract(64, 64, "letterbox"), classes=1, top_k=1)
    model = onnx.load(made.path / "model.onnx")
    del model.graph.node[-1]
    whole = numpy_helper.from_array(np.tile(np.float32([0.5, 0.25, 0.5, 0.25]), (1, 16, 1)), "whole")
    model.graph.initializer.append(whole)
    model.graph.node.append(helper.make_node("Identity", ["whole"], ["boxes"]))
    joined = with_frames(model, made.manifest, 50, 100)
    boxes = inside(joined, smooth((50, 100)), "boxes")[0]
    # x: 0.25..0.75 of 100; y: 0.125..0.375 of 64 input pixels, each 1.5625 frame pixels.
    np.testing.assert_allclose(boxes[0, 0], [25, 12.5, 75, 37.5], atol=1e-4)  # float32


def test_operators_are_standard_and_only_a_cast_reads_bytes(tmp_path):
    made = patch_detector.bundle(tmp_path / "b", contract=CONTRACTS[1])
    model = with_frames(onnx.load(made.path / "model.onnx"), made.manifest, 300, 500)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 19)]
    assert {node.op_type for node in model.graph.node if "frames" in node.input} == {"Cast"}
    added = {node.op_type for node in model.graph.node if node.name.startswith(("/frame/", "/objects/"))}
    assert added == {
        "Cast",
        "Transpose",
        "AveragePool",
        "Resize",
        "Round",
        "Pad",
        "Reshape",
        "TopK",
        "Div",
        "Mul",
        "Sub",
        "Sigmoid",
        "Unsqueeze",
        "Concat",
        "GatherElements",
        "Split",
        "Add",
        "Max",
        "Min",
        "Identity",
    }
    kinds = {item.name: item.type.tensor_type.elem_type for item in [*model.graph.input, *model.graph.output]}
    assert kinds == {
        "frames": TensorProto.UINT8,
        "boxes": TensorProto.FLOAT,
        "scores": TensorProto.FLOAT,
        "labels": TensorProto.INT32,
    }


def test_equal_scores_keep_the_order_of_the_queries(tmp_path):
    made = patch_detector.bundle(tmp_path / "b", classes=2, top_k=7)
    model = onnx.load(made.path / "model.onnx")
    for item in model.graph.initializer:
        if item.name in ("weight", "spread"):
            item.CopyFrom(numpy_helper.from_array(np.zeros(tuple(item.dims), np.float32), item.name))
    joined = with_frames(model, made.manifest, 64, 96)
    bias = numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == "bias"))[:2]
    assert inside(joined, smooth((64, 96)), "scores")[0][0].std() == 0
    session = onnxruntime.InferenceSession(joined.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = session.run(["labels"], {"frames": smooth((64, 96))[None]})[0]
    assert labels.tolist() == [[int(bias.argmax())] * 7]


def test_a_file_that_is_up_to_date_is_kept_and_a_stale_one_written_again(tmp_path):
    made = patch_detector.bundle(tmp_path / "b")
    assert write_frames(made, 70, 100) == ["model.frame-70x100.onnx"]
    path = made.path / "model.frame-70x100.onnx"
    first, before = path.stat().st_mtime_ns, path.read_bytes()
    write_frames(Bundle.open(made.path), 70, 100)
    assert path.stat().st_mtime_ns == first
    with made.add("model.onnx", stage="export") as temporary:
        patch_detector.write(temporary, made.manifest.input, 3, seed=1)
    with pytest.raises(BundleError, match=r"frame-70x100.onnx was made from model.onnx .*export \S+ --frame 70x100"):
        load_frames(made)
    write_frames(made, 70, 100)
    assert path.read_bytes() != before
    assert load_frames(made).height == 70


def planted(model: onnx.ModelProto, op: str, change) -> onnx.ModelProto:
    ours = [node for node in model.graph.node if node.name.startswith(("/frame", "/objects"))]
    change(model, next(node for node in ours if node.op_type == op))
    return model


def nearest(model, node):
    next(item for item in node.attribute if item.name == "mode").s = b"nearest"


def other_factor(model, node):
    model.graph.initializer.append(numpy_helper.from_array(np.float32([[[0.45]]]), "less"))
    node.input[1] = "less"


def smallest(model, node):
    node.attribute.append(helper.make_attribute("largest", 0))


@pytest.mark.parametrize(
    "op, change, message",
    [("Resize", nearest, "resize"), ("Mul", other_factor, "detections"), ("TopK", smallest, "detections")],
)
def test_a_graph_that_computes_something_else_is_refused(tmp_path, op, change, message):
    made = patch_detector.bundle(tmp_path / "b", activation="softmax")
    model = with_frames(onnx.load(made.path / "model.onnx"), made.manifest, 70, 100)
    check(model, made.manifest, 70, 100)
    with pytest.raises(ExportError, match=message):
        check(planted(model, op, change), made.manifest, 70, 100)


def test_what_load_frames_says_when_it_has_no_fitting_graph(tmp_path):
    made = patch_detector.bundle(tmp_path / "b", files=("model.onnx", "model.int8.onnx"))
    with pytest.raises(BundleError, match=r"--frame HxW"):
        load_frames(made)
    write_frames(made, 64, 96, ["model.onnx", "model.int8.onnx"])
    write_frames(made, 70, 100)
    with pytest.raises(UsageError, match="64x96, 70x100; give one of them"):
        load_frames(made)
    with pytest.raises(BundleError, match="none for 10x10"):
        load_frames(made, size=(10, 10))
    with pytest.raises(UsageError, match="did you mean 'int8'"):
        load_frames(made, size=(64, 96), precision="int")
    assert "int8 for frames of 64 x 96" in load_frames(made, size=(64, 96), precision="int8").description
    with pytest.raises(DataError, match=r"expected 70 x 100; run: edgedetr export BUNDLE --frame 64x96"):
        load_frames(made, size=(70, 100))(smooth((64, 96)))
    assert "model.int8.frame-64x96.onnx" in made.manifest.files


def test_a_graph_of_another_kind_is_named(tmp_path):
    made = patch_detector.bundle(tmp_path / "b")
    with made.add("model.frame-64x96.onnx", stage="export") as temporary:
        temporary.write_bytes((made.path / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"expected frames \[1, H, W, 3\]"):
        load_frames(made)


def test_any_runner_of_the_protocol_will_do_and_nan_is_an_error():
    class Fixed:
        name, height, width = "fixed", 4, 6

        def run(self, frame):
            assert frame.shape == (1, 4, 6, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
            return {
                "boxes": np.zeros((1, 2, 4), np.float32),
                "scores": np.float32([[0.9, np.nan]]),
                "labels": np.int32([[0, 0]]),
            }

    with pytest.raises(ModelError, match="NaN"):
        FrameDetector(Fixed(), ())(np.zeros((4, 6, 3), np.uint8)[:, ::-1])


def detections(*rows: tuple[float, float, int]) -> Detections:
    """Of (x0, score, class)."""
    x, scores, classes = (np.array(column) for column in zip(*rows))
    return Detections(np.stack([x, x, x + 1, x + 1], axis=1), scores, classes)


@pytest.mark.parametrize(
    "other, same",
    [
        ([(1, 0.9, 0), (2, 0.5, 1), (3, 0.5, 0)], True),
        ([(1, 0.9, 0), (3, 0.5, 0), (2, 0.5, 1)], True),  # two equal scores in another order
        ([(1, 0.9, 0), (2, 0.5, 1), (7, 0.5, 0)], True),  # another of the last score came in
        ([(1, 0.9, 1), (2, 0.5, 1), (3, 0.5, 0)], False),
        ([(1.5, 0.9, 0), (2, 0.5, 1), (3, 0.5, 0)], False),
        ([(1, 0.8, 0), (2, 0.5, 1), (3, 0.5, 0)], False),
        ([(1, 0.9, 0), (2, 0.5, 1)], False),
        ([(1, 0.9, 0), (2, 0.5, 1), (3, float("nan"), 0)], False),
    ],
)
def test_lists_agree_but_for_the_order_of_equal_scores(other, same):
    first = detections((1, 0.9, 0), (2, 0.5, 1), (3, 0.5, 0))
    assert detections_allclose(detections(*other), first, pixels=0.1, score=1e-3) is same
