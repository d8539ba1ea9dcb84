"""The meaning of an external file's outputs is found and reported, and refused where two readings fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from planted_onnx import BOXES, LABELS, QUERIES, SCORES, SIZE, convert, corners, labeled, planted

from edgedetr import cli
from edgedetr.errors import ExportError, UsageError
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.onnx_model import ImportedOnnxModel, import_onnx_model
from edgedetr.runtime.bundle_detector import load

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return labeled(tmp_path_factory.mktemp("labeled"))


def imported(model: onnx.ModelProto, folder: Path, **asked) -> ImportedOnnxModel:
    onnx.save(model, folder / "m.onnx")
    return import_onnx_model(folder / "m.onnx", folder / "b", ImportOptions(**asked))


def assert_finds_what_was_planted(
    result: ImportedOnnxModel, boxes: np.ndarray = BOXES, *, scores=SCORES, atol=2e-3
) -> None:
    """By the bundle's own detector; the truth is the test's, not the file's."""
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    image = np.random.default_rng(9).integers(0, 256, (int(SIZE[1]), int(SIZE[0]), 3), dtype=np.uint8)
    found = detector([image])[0]
    expected = np.clip(corners(boxes) * SIZE, 0, SIZE)
    np.testing.assert_array_equal(found.class_id[:6], LABELS)
    # The image moves boxes by 1e-5 of its mean, which is 0.5; float16 rounds more
    np.testing.assert_allclose(found.xyxy[:6], expected, atol=100 * atol)
    if scores is not None:
        np.testing.assert_allclose(found.confidence[:6], scores, atol=atol)


# ---- boxes


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(
    "layout, traced", [("cxcywh", False), ("xyxy", False), ("xywh", False), ("xyxy", True), ("xywh", True)]
)
def test_boxes_are_read_as_they_are_written(tmp_path, layout, pixels, traced):
    """By their numbers, or by the conversion in the graph; names of outputs have no meaning here."""
    made = planted(**({} if traced else {"layout": layout, "pixels": pixels}))
    boxes = convert(made, layout, pixels=pixels) if traced else "b"
    asked = {"boxes": "xywh-pixels" if pixels else "xywh"} if layout == "xywh" and not traced else {}
    result = imported(made.model(["l", boxes]), tmp_path, **asked)
    assert result.boxes == layout + ("-pixels" if pixels else "")
    assert any(
        layout[0] in reason and ("the graph makes them" in reason) == traced
        for reason in result.notes
        if reason.startswith("boxes are")
    )
    assert_finds_what_was_planted(result)


BIG = np.array(
    [
        [0.5, 0.5, 0.9, 0.9],
        [0.45, 0.5, 0.8, 0.96],
        [0.5, 0.45, 0.94, 0.8],
        [0.48, 0.52, 0.9, 0.9],
        [0.5, 0.5, 0.96, 0.96],
        [0.52, 0.5, 0.9, 0.94],
    ]
)


def big(**asked):
    """Boxes whose width is beyond their center: corners in order as well, and nothing leaves the image much."""
    made = planted(boxes=BIG, **asked)
    made.constants["b0"][:] = np.where(
        np.isin(np.arange(QUERIES), np.arange(0, QUERIES, 5))[:, None],
        made.constants["b0"],
        made.constants["b0"][:, :1],
    )
    return made.model(["l", "b"])


def test_two_readings_of_boxes_are_refused_until_somebody_decides(tmp_path, tmp_path_factory):
    with pytest.raises(ExportError, match="cxcywh .* or xyxy .*--boxes cxcywh or --boxes xyxy"):
        imported(big(), tmp_path)
    assert not (tmp_path / "b").exists()
    result = imported(big(), tmp_path, boxes="cxcywh")
    assert "--boxes says so" in " ".join(result.notes)
    (tmp_path / "by-labels").mkdir()
    result = imported(big(), tmp_path / "by-labels", data=labeled(tmp_path_factory.mktemp("big"), BIG))
    assert result.boxes == "cxcywh"
    assert result.ap is not None and result.ap > 95
    assert any("cxcywh have AP" in reason for reason in result.notes)


def test_a_sigmoid_keeps_no_corners_in_order(tmp_path):
    """DETR's own end: what the numbers leave open, the graph decides."""
    made = planted(boxes=BIG)
    made.constants["b0"][:] = made.constants["b0"][:, :1]
    made.constants["b0"] = np.log(made.constants["b0"] / (1 - made.constants["b0"]))
    made.add("Sigmoid", "b", out="sides")
    made.add("Identity", "sides", out="boxes")
    result = imported(made.model(["l", "boxes"]), tmp_path)
    assert result.boxes == "cxcywh"
    assert any("straight out of a Sigmoid" in reason for reason in result.notes)


@pytest.mark.parametrize(
    "asked, message",
    [("xyxy", "--boxes xyxy: .* % of the widths or heights would be negative"), ("cxcywh-pixels", None)],
)
def test_what_is_asked_for_must_be_possible(tmp_path, asked, message):
    model = planted().model(["l", "b"])
    if message is None:  # a fraction of a pixel: the objects are nowhere near, which only the caller can know
        assert imported(model, tmp_path, boxes=asked).boxes == asked
    else:
        with pytest.raises(ExportError, match=message):
            imported(model, tmp_path, boxes=asked)


def test_the_graph_is_believed_more_than_the_caller(tmp_path):
    made = planted()
    model = made.model(["l", convert(made, "xyxy")])
    with pytest.raises(UsageError, match="--boxes cxcywh: the graph makes boxes as xyxy"):
        imported(model, tmp_path, boxes="cxcywh")


@pytest.mark.parametrize("layout", ["cxcywh", "xyxy"])
def test_boxes_that_the_graph_writes_with_y_first_are_refused(tmp_path, layout):
    made = planted()
    boxes = "b" if layout == "cxcywh" else convert(made, "xyxy")
    made.add("Gather", boxes, made.const("order", [1, 0, 3, 2]), out="turned_round", axis=2)
    with pytest.raises(ExportError, match="'turned_round' are those of tensor 'b' with x and y swapped"):
        imported(made.model(["l", "turned_round"]), tmp_path)


# ---- classes


@pytest.mark.parametrize("name", ["scores", "labels", "logits", "out"])
def test_probabilities_get_no_second_sigmoid_whatever_they_are_called(tmp_path, name):
    made = planted()
    made.add("Sigmoid", "l", out=name)
    result = imported(made.model([name, "b"]), tmp_path)
    assert any("sigmoid of tensor 'l'" in reason for reason in result.notes)
    assert_finds_what_was_planted(result)


def test_a_sigmoid_that_is_written_out_is_seen_by_its_numbers(tmp_path):
    made = planted()
    made.add("Neg", "l", out="n")
    made.add("Exp", "n", out="e")
    made.add("Add", "e", made.const("one", np.float32(1)), out="d")
    made.add("Reciprocal", "d", out="probability")
    result = imported(made.model(["b", "probability"]), tmp_path)
    assert result.activation == "sigmoid"
    assert_finds_what_was_planted(result)


@pytest.mark.parametrize("form", ["log of sigmoid", "softplus", "log_softmax"])
def test_logarithms_of_probabilities_are_no_logits(tmp_path, form):
    """All are below 0, as the logits of a trained sigmoid are; a second sigmoid would give 0.49 for 0.95."""
    made = planted(softmax=form == "log_softmax")
    if form == "log_softmax":
        made.add("LogSoftmax", "l", out="p", axis=-1)
    elif form == "softplus":  # torch's logsigmoid
        made.add("Neg", "l", out="n")
        made.add("Softplus", "n", out="s")
        made.add("Neg", "s", out="p")
    else:
        made.add("Sigmoid", "l", out="s")
        made.add("Log", "s", out="p")
    result = imported(made.model(["p", "b"]), tmp_path)
    assert any("the logarithm of the s" in reason for reason in result.notes)
    assert_finds_what_was_planted(result, scores=None if form == "log_softmax" else SCORES)


@pytest.mark.parametrize("op", ["Tanh", "Softplus", "Exp"])
def test_what_bends_the_logits_is_refused_whatever_its_range(tmp_path, op):
    made = planted()
    made.add(op, "l", out="p")
    made.add("Mul", "p", made.const("ten", np.float32(10)), out="q")
    with pytest.raises(ExportError, match=f"'q' are what {op} gives, and no logits were found"):
        imported(made.model(["q", "b"]), tmp_path)


@pytest.mark.parametrize("cut", [False, True])
def test_softmax_in_the_graph_means_no_object_is_the_last(tmp_path, cut):
    made = planted(softmax=True)
    out = made.add("Softmax", "l", out="p", axis=-1)
    if cut:
        made.add("Slice", "p", made.const("from", [0]), made.const("to", [3]), made.const("along", [2]), out="q")
        out = "q"
    result = imported(made.model([out, "b"]), tmp_path)
    assert (result.activation, len(result.bundle.manifest.classes)) == ("softmax", 3)
    assert_finds_what_was_planted(result, scores=None)


def test_probabilities_that_come_from_nowhere_are_refused(tmp_path):
    made = planted()
    made.constants["l0"] = 1 / (1 + np.exp(-made.constants["l0"]))
    with pytest.raises(ExportError, match="lie in 0..1, and no Sigmoid or Softmax was found .*--activation sigmoid"):
        imported(made.model(["l", "b"]), tmp_path)


def test_an_asked_activation_against_the_graph_is_refused(tmp_path):
    made = planted()
    made.add("Sigmoid", "l", out="p")
    with pytest.raises(UsageError, match="--activation softmax: the file itself applies sigmoid"):
        imported(made.model(["p", "b"]), tmp_path, activation="softmax")


def doubtful(*, softmax: bool):
    """Four logits for three classes, whose values do not reveal how the model was trained."""
    made = planted(softmax=softmax, spare=True, quiet=-0.5)
    if softmax:
        made.constants["l0"][..., -1] -= 5.6
    return made.model(["l", "b"])


def test_one_logit_more_than_classes_never_becomes_a_class_in_silence(tmp_path):
    with pytest.raises(UsageError, match="4 class logits; say what they are: --activation softmax .*no object"):
        imported(doubtful(softmax=True), tmp_path)
    result = imported(doubtful(softmax=True), tmp_path, activation="softmax")
    assert len(result.bundle.manifest.classes) == 3


@pytest.mark.parametrize("softmax", [False, True])
def test_labeled_images_decide_between_softmax_and_a_spare_logit(tmp_path, data, softmax):
    model = planted(softmax=softmax, spare=True).model(["l", "b"])
    result = imported(model, tmp_path, data=data)
    assert result.activation == ("softmax" if softmax else "sigmoid")
    assert_finds_what_was_planted(result, scores=None)


def test_as_many_logits_as_classes_are_sigmoid(tmp_path, data):
    result = imported(planted(quiet=-0.5).model(["l", "b"]), tmp_path, data=data)
    assert result.activation == "sigmoid"
    assert any("3 class logits for 3 classes" in reason for reason in result.notes)
    assert result.ap is not None and result.ap > 95


def test_a_file_that_finds_nothing_on_the_labeled_images_says_so(tmp_path, data, capsys):
    made = planted()
    made.constants["b0"][..., 2:] = 0.01
    onnx.save(made.model(["l", "b"]), tmp_path / "m.onnx")
    assert cli.run(["import", str(tmp_path / "m.onnx"), "--out", str(tmp_path / "b"), "--data", str(data)]) == 0
    assert "finds next to nothing there" in capsys.readouterr().err


# ---- forms


def test_which_outputs_count_can_be_given(tmp_path):
    """Three classes and "no object" are four numbers too: the boxes are recognized by their values, or by name."""
    made = planted(softmax=True)
    made.add("Abs", "l", out="l2")
    with pytest.raises(ExportError, match="pairs of outputs may be classes and boxes; say which: --outputs"):
        imported(made.model(["l2", "l", "b"]), tmp_path)
    result = imported(made.model(["l2", "l", "b"]), tmp_path, outputs=("l", "b"), activation="softmax")
    assert_finds_what_was_planted(result, scores=None)
    with pytest.raises(UsageError, match="no output 'x'"):
        imported(made.model(["l", "b"]), tmp_path, outputs=("x", "b"))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("first", ["boxes", "classes"])
def test_boxes_and_classes_in_one_are_taken_apart(tmp_path, turned, logits, first):
    """Ultralytics' forms: boxes may leave the image, and are not clipped."""
    boxes = BOXES.copy()
    boxes[1] = [0.97, 0.2, 0.3, 0.16]
    made = planted(boxes=boxes)
    scores = "l" if logits else made.add("Sigmoid", "l", out="p")
    parts = ["b", scores] if first == "boxes" else [scores, "b"]
    if turned:
        parts = [made.add("Transpose", part, out=f"{part}.T", perm=[0, 2, 1]) for part in parts]
    made.add("Concat", *parts, out="output0", axis=1 if turned else 2)
    result = imported(made.model(["output0"]), tmp_path)
    assert (result.contract, result.queries) == ("joined", QUERIES)
    assert_finds_what_was_planted(result, boxes)


@pytest.mark.parametrize("first", ["boxes", "classes"])
@pytest.mark.parametrize("softmax", [False, True])
def test_four_classes_are_distinguished_from_four_sides(tmp_path, softmax, first):
    made = planted(softmax=softmax, spare=not softmax)
    scores = made.add("Softmax" if softmax else "Sigmoid", "l", out="p")
    made.add("Concat", *(("b", scores) if first == "boxes" else (scores, "b")), out="output0", axis=2)
    result = imported(made.model(["output0"]), tmp_path)
    assert (result.activation, len(result.bundle.manifest.classes)) == (("softmax", 3) if softmax else ("sigmoid", 4))
    assert_finds_what_was_planted(result, scores=None)


def chosen(made, *, count: int = 10, layout: str = "xyxy", labels=TensorProto.INT64, add: int = 0, per_query=False):
    """RT-DETR's decoding: names of labels [1, n], boxes [1, n, 4], scores [1, n] in pixels."""
    boxes = "b" if layout == "cxcywh" else convert(made, layout, pixels=True)
    made.add("Sigmoid", "l", out="p")
    made.const("k", np.array([count]))
    if per_query:
        made.add("ReduceMax", "p", out="best", axes=[2], keepdims=0)
        made.add("ArgMax", "p", out="which", axis=2, keepdims=0)
        made.nodes.append(helper.make_node("TopK", ["best", "k"], ["scores", "query"], "topk", axis=1))
        made.add("GatherElements", "which", "query", out="label", axis=1)
    else:
        made.add("Reshape", "p", made.const("flat", np.array([1, -1])), out="row")
        made.nodes.append(helper.make_node("TopK", ["row", "k"], ["scores", "place"], "topk", axis=1))
        made.add("Div", "place", made.const("classes", np.array(made.width)), out="query")
        made.add("Mod", "place", "classes", out="label")
    if add:
        made.add("Add", "label", made.const("offset", np.array(add)), out="label2")
    made.add("Cast", "label2" if add else "label", out="labels", to=labels)
    made.add("Unsqueeze", "query", made.const("last", np.array([2])), out="q1")
    made.add("Expand", "q1", made.const("four", np.array([1, 1, 4])), out="q4")
    made.add("GatherElements", boxes, "q4", out="boxes", axis=1)
    return ["labels", "boxes", "scores"]


@pytest.mark.parametrize("labels", [TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT])
@pytest.mark.parametrize("layout", ["xyxy", "xywh", "cxcywh"])
def test_chosen_objects_are_traced_to_all_queries(tmp_path, layout, labels):
    made = planted()
    names = chosen(made, layout=layout, labels=labels)
    result = imported(made.model([("labels", labels), *names[1:]]), tmp_path)
    assert (result.contract, result.queries, result.bundle.manifest.output.top_k) == ("decoded", QUERIES, 10)
    assert result.boxes == (layout if layout == "cxcywh" else f"{layout}-pixels")
    assert_finds_what_was_planted(result)


@pytest.mark.parametrize(
    "order",
    [
        ("boxes", "score", "label"),
        ("label", "score", "boxes"),
        ("score", "label", "boxes"),
        ("boxes", "label", "score"),
    ],
)
def test_six_columns_are_distinguished_by_their_numbers(tmp_path, order):
    made = planted()
    chosen(made, labels=TensorProto.FLOAT)
    made.add("Unsqueeze", "scores", "last", out="score")
    made.add("Unsqueeze", "labels", "last", out="label1")
    made.add("Concat", *({"label": "label1"}.get(name, name) for name in order), out="output0", axis=2)
    result = imported(made.model(["output0"]), tmp_path)
    assert result.contract == "decoded"
    assert_finds_what_was_planted(result)


def test_boxes_with_their_score_and_labels_apart(tmp_path):
    made = planted()
    chosen(made)
    made.add("Unsqueeze", "scores", "last", out="score")
    made.add("Concat", "boxes", "score", out="dets", axis=2)
    result = imported(made.model(["dets", ("labels", TensorProto.INT64)]), tmp_path)
    assert_finds_what_was_planted(result)


def test_labels_that_are_numbered_otherwise_are_reported(tmp_path):
    made = planted()
    names = chosen(made, add=1)
    result = imported(made.model([("labels", TensorProto.INT64), *names[1:]]), tmp_path)
    assert any("the file numbers its labels otherwise (0 as 1" in reason for reason in result.notes)
    assert_finds_what_was_planted(result)


def test_one_class_of_each_query_is_reported(tmp_path):
    made = planted()
    names = chosen(made, per_query=True)
    result = imported(made.model([("labels", TensorProto.INT64), *names[1:]]), tmp_path)
    assert any("the file keeps one class of each query" in reason for reason in result.notes)
    assert_finds_what_was_planted(result)


# ---- float16


def test_an_fp16_graph_with_float32_inputs_and_outputs_becomes_float32(tmp_path):
    made = planted()
    for name in ("l0", "b0", "tiny"):
        made.constants[name] = made.constants[name].astype(np.float16)
    made.nodes.insert(0, helper.make_node("Cast", ["pixel_values"], ["fp16_pixels"], "down", to=TensorProto.FLOAT16))
    made.nodes[1].input[0] = "fp16_pixels"
    made.add("Sigmoid", "l", out="p")
    made.add("Cast", "p", out="scores", to=TensorProto.FLOAT)
    made.add("Cast", "b", out="boxes", to=TensorProto.FLOAT)
    result = imported(made.model(["scores", "boxes"]), tmp_path)
    assert result.is_fp16
    assert "float16" in result.describe()
    model = onnx.load(result.bundle.require("model.onnx"))
    assert {tensor.data_type for tensor in model.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    assert "Cast" not in {node.op_type for node in model.graph.node}
    assert_finds_what_was_planted(result, atol=4e-3)


# ---- what is asked for and cannot be


def test_columns_without_a_data_set_are_refused(tmp_path, data):
    with pytest.raises(UsageError, match="--columns category-id .*give --data"):
        imported(planted().model(["l", "b"]), tmp_path, columns="category-id")


def test_the_reading_is_in_the_json(tmp_path, data, capsys):
    onnx.save(planted(layout="xyxy").model(["l", "b"]), tmp_path / "m.onnx")
    words = ["import", str(tmp_path / "m.onnx"), "--out", str(tmp_path / "b"), "--data", str(data), "--json"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["boxes"], result["activation"], result["contract"]) == ("xyxy", "sigmoid", "raw")
    assert result["ap"] > 95
    assert all(reason in captured.err for reason in result["why"])


def test_the_file_keeps_no_constant_that_nothing_reads(tmp_path):
    made = planted()
    made.const("nobody", np.zeros(5000, np.float32))
    result = imported(made.model(["l", "b"]), tmp_path)
    graph = onnx.load(result.bundle.require("model.onnx")).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}
    assert not graph.value_info
