"""ONNX files of every contract that were made elsewhere become bundles that find the same objects."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from external_models import (
    CLASSES,
    HEIGHT,
    QUERIES,
    WIDTH,
    Decoded,
    Raw,
    export,
    hugging_face_d_fine,
    hugging_face_detr,
    hugging_face_rt_detr,
    joined,
    open_session,
    rf_detr,
    sample_images,
)
from onnx import helper, numpy_helper

from edgedetr import cli
from edgedetr.boxes import cxcywh_to_xyxy
from edgedetr.bundle import Bundle
from edgedetr.data.synthetic import render
from edgedetr.errors import ExportError, UsageError
from edgedetr.importing.import_options import ImportOptions, Normalization
from edgedetr.importing.onnx_model import import_onnx_model
from edgedetr.lint.lint import lint
from edgedetr.quantization.policy import get_role
from edgedetr.runtime.bundle_detector import load

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("scenes") / "set", train=8, val=2, verify=4, size=96, seed=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One file of each contract. Three are the library's exporter's, three differ from these in their last nodes."""
    folder = tmp_path_factory.mktemp("external")
    detr = hugging_face_detr()
    sizes = (torch.tensor([[WIDTH, HEIGHT]]),)
    pixels, two = ("pixel_values",), ("images", "orig_target_sizes")
    answer = ("labels", "boxes", "scores")
    raw = export(Raw(hugging_face_rt_detr()), folder / "raw.onnx", names=pixels, results=("logits", "pred_boxes"))
    return {
        "raw": raw,
        "softmax": export(
            Raw(detr), folder / "softmax.onnx", names=pixels, results=("logits", "pred_boxes"), open_size=False
        ),
        "rf": rf_detr(raw, folder / "rf.onnx"),
        "decoded": export(
            Decoded(hugging_face_d_fine()), folder / "decoded.onnx", names=two, results=answer, opset=16, extra=sizes
        ),
        "decoded-softmax": export(
            Decoded(detr, sigmoid=False), folder / "soft.onnx", names=two, results=answer, open_size=False, extra=sizes
        ),
        "joined": joined(raw, folder / "joined.onnx"),
    }


ASKED = {
    "raw": {"size": (HEIGHT, WIDTH)},
    "softmax": {"activation": "softmax", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)},
    "rf": {},
    "decoded": {"size": (HEIGHT, WIDTH)},
    "decoded-softmax": {},
    "joined": {"size": (HEIGHT, WIDTH)},
}
FOUND = {
    "raw": "raw",
    "softmax": "raw",
    "rf": "raw",
    "decoded": "decoded",
    "decoded-softmax": "decoded",
    "joined": "joined",
}


@pytest.fixture(scope="module", params=list(ASKED))
def imported(request, files, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "b.bundle"
    return (
        request.param,
        files[request.param],
        import_onnx_model(files[request.param], out, ImportOptions(data=scenes, **ASKED[request.param])),
    )


@cache
def session_of(path: Path):
    """One for all images: opening a file takes longer than running it."""
    return open_session(str(path))


def answers(kind: str, path: Path, image: np.ndarray, pixels: Normalization):
    """What the file itself finds in one image, by this test's own arithmetic: labels, boxes xyxy px, scores."""
    std, mean = (np.array(value, np.float32).reshape(3, 1, 1) for value in (pixels.std, pixels.mean))
    session = session_of(path)
    feed = {session.get_inputs()[0].name: ((image / np.float32(255) - mean) / std).astype(np.float32)}
    if len(session.get_inputs()) == 2:
        feed["orig_target_sizes"] = np.array([[WIDTH, HEIGHT]], np.int64)
    given = dict(zip([item.name for item in session.get_outputs()], session.run(None, feed)))
    if kind.startswith("decoded"):
        return given["labels"][0], given["boxes"][0], given["scores"][0]
    if kind == "joined":
        boxes, scores = given["output0"][0, :, :4], given["output0"][0, :, 4:]
    else:
        logits = given["logits" if "logits" in given else "labels"][0].astype(np.float64)
        boxes = given["pred_boxes" if "pred_boxes" in given else "dets"][0]
        scores = 1 / (1 + np.exp(-logits))
        if kind == "softmax":
            power = np.exp(logits - logits.max(-1, keepdims=True))
            scores = (power / power.sum(-1, keepdims=True))[:, :-1]
            scores = np.where(scores == scores.max(-1, keepdims=True), scores, -1)  # the best class of each query
    order = np.argsort(-scores, axis=None)[:15]
    query, label = np.unravel_index(order, scores.shape)
    return label, cxcywh_to_xyxy(boxes[query]) * [WIDTH, HEIGHT, WIDTH, HEIGHT], scores[query, label]


def test_the_bundle_finds_what_the_file_finds(imported):
    kind, path, result = imported
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    for image in sample_images(2):
        labels, boxes, scores = answers(kind, path, image[None], result.normalization)
        found = detector([image.transpose(1, 2, 0).astype(np.uint8)])[0]
        # Float32 through another order of summation, after folding: measured 2e-5 in scores, 3e-3 px in boxes.
        np.testing.assert_allclose(found.confidence[:10], scores[:10], atol=1e-3)
        clipped = np.clip(boxes, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        # Objects of almost one score may be in either order: each of one list is in the other.
        there = (
            (found.class_id[:, None] == labels)
            & (np.abs(found.xyxy[:, None] - clipped).max(-1) <= 0.1)
            & (np.abs(found.confidence[:, None] - scores) <= 1e-3)
        )  # [found, of the file]
        assert (there[:10].any(axis=1) & there[:, :10].any(axis=0)).all()


def test_the_contract_and_the_activation_are_recognized(imported):
    kind, _, result = imported
    assert result.contract == FOUND[kind]
    assert result.activation == ("softmax" if "softmax" in kind else "sigmoid")
    assert result.queries == QUERIES
    assert result.objects >= 10
    output = result.bundle.manifest.output
    assert output.top_k == (15 if result.contract == "decoded" else 100)


def test_the_graph_is_one_of_ours(imported):
    kind, _, result = imported
    model = onnx.load(result.bundle.require("model.onnx"))
    assert {item.domain: item.version for item in model.opset_import} == {"": 19}
    shapes = {
        item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim]
        for item in [*model.graph.input, *model.graph.output]
    }
    width = CLASSES + (result.activation == "softmax")
    assert shapes == {"images": [1, 3, HEIGHT, WIDTH], "logits": [1, QUERIES, width], "boxes": [1, QUERIES, 4]}
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert not {"BatchNormalization", "Shape", "If"} & {node.op_type for node in model.graph.node}
    # LayerNorm of opset 16 stays written out. Nothing else is left to say.
    assert {finding.rule for finding in lint(model)} == ({"layer-norm"} if kind == "decoded" else set())
    assert result.gathered == (0 if "softmax" in kind else 6)  # two layers, three levels


def test_selection_and_decoder_are_recognized_in_the_graph(imported):
    """Names of another exporter do not show it; the rows of each node and its paths to the outputs do."""
    from edgedetr.onnx_graph.index import GraphIndex
    from edgedetr.quantization.policy import load_policy, make_plan

    kind, _, result = imported
    plan = make_plan(GraphIndex(onnx.load(result.bundle.require("model.onnx"))), load_policy("default"))
    names = [layer.node for layer in plan.layers]
    assert sum("/backbone/" in name for name in names) >= 8
    assert not [name for name in names if "bbox" in name or "class" in name or "score" in name]
    if "softmax" not in kind:
        reasons = {reason for name, reason in plan.float_layers.items() if "enc_bbox_head" in name}
        assert any("query selection" in reason for reason in reasons)


def test_names_are_not_needed_for_that(files, scenes, tmp_path):
    model = onnx.load(files["raw"])
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "nameless.onnx")
    result = import_onnx_model(
        tmp_path / "nameless.onnx", tmp_path / "b", ImportOptions(data=scenes, size=(HEIGHT, WIDTH))
    )
    roles = Counter(get_role(node) for node in onnx.load(result.bundle.require("model.onnx")).graph.node)
    assert roles["decoder"] > 50
    assert roles["query_selection"] > 5
    assert set(roles) <= {"", "decoder", "query_selection"}


# ---- end to end


@pytest.mark.parametrize("kind", [pytest.param("raw", marks=pytest.mark.slow), "decoded"])
def test_import_int8_lint_and_verify_by_the_command_line(kind, files, scenes, tmp_path, capsys):
    out = str(tmp_path / "b.bundle")
    size = f"{HEIGHT}x{WIDTH}"
    assert cli.run(["import", str(files[kind]), "--out", out, "--data", str(scenes), "--input", size]) == 0
    err = capsys.readouterr().err
    assert "there is no PyTorch model" in err
    assert "normalization taken: (pixel x 0.00392157 - 0 0 0) / 1 1 1" in err
    assert cli.run(["export", out, "--int8"]) == 0
    assert cli.run(["lint", out]) == 0
    bundle = Bundle.open(out)
    assert {"reference.npz", "ranges.json", "model.int8.onnx", "model.int8-cpu.onnx"} <= set(bundle.manifest.files)
    listed = bundle.manifest.files
    assert listed["reference.npz"].made_from == {"model.onnx": listed["model.onnx"].sha256}
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(bundle.require("model.int8.onnx")).graph.node)
    before = (tmp_path / "b.bundle" / "bundle.json").read_bytes()
    assert cli.run(["export", out, "--int8"]) == 0
    assert (tmp_path / "b.bundle" / "bundle.json").read_bytes() == before
    assert cli.run(["export", out, "--sampling", "grid_sample"]) == 2
    if kind == "raw":
        return  # verify reads an imported bundle alike, whatever the file was
    capsys.readouterr()
    # A model of random weights finds nothing: nothing to lose, so that nothing passes.
    assert cli.run(["verify", out, "--max-drop", "100", "--threads", "1", "--backend", "onnxruntime", "--json"]) == 3
    captured = capsys.readouterr()
    assert "NOTHING TO LOSE" in captured.err
    artifacts = {(s["name"], s["backend"]): s for s in json.loads(captured.out)["stages"]}
    assert ("reference", "onnxruntime") in artifacts
    assert artifacts["onnx", "onnxruntime"]["drop"] == 0  # the same file, the same library
    assert artifacts["onnx", "onnxruntime"]["parity"]["matched"] in (None, 1.0)
    assert "an imported graph has no PyTorch model" in captured.err


# ---- what the file cannot say


def test_one_logit_more_than_classes_must_be_explained(files, scenes, tmp_path):
    with pytest.raises(UsageError, match="7 class logits for 6 classes; say what they are: --activation softmax"):
        import_onnx_model(files["softmax"], tmp_path / "b", ImportOptions(data=scenes))
    assert not (tmp_path / "b").exists()


def test_names_put_the_logits_in_the_order_of_the_data_set(files, scenes, tmp_path):
    known = ["circle", "square", "triangle", "star", "ring", "cross"]
    (tmp_path / "names.txt").write_text("\n".join(["cross", *known[:5]]) + "\n")
    result = import_onnx_model(
        files["raw"], tmp_path / "b", ImportOptions(data=scenes, size=(HEIGHT, WIDTH), classes=tmp_path / "names.txt")
    )
    assert [item.name for item in result.bundle.manifest.classes] == known
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    image = sample_images(1)
    labels, _, _ = answers("raw", files["raw"], image, result.normalization)
    found = detector([image[0].transpose(1, 2, 0).astype(np.uint8)])[0]
    assert found.class_id[:10].tolist() == [(label - 1) % 6 for label in labels[:10]]


def test_without_data_classes_come_from_the_file_of_names(files, tmp_path):
    (tmp_path / "names.txt").write_text("a\n-\nc\nd\ne\nf\n")
    result = import_onnx_model(
        files["raw"], tmp_path / "b", ImportOptions(size=(HEIGHT, WIDTH), classes=tmp_path / "names.txt")
    )
    assert [(item.name, item.category_id) for item in result.bundle.manifest.classes] == [
        ("a", 0),
        ("c", 2),
        ("d", 3),
        ("e", 4),
        ("f", 5),
    ]
    assert result.bundle.manifest.data is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "0 names"),
        ("a\n\nb", "empty or repeated"),
        ("a\na", "empty or repeated"),
        ("a\nb\nc", "6 class logits for 3 classes|line for each|does not name"),
    ],
)
def test_a_faulty_list_of_names_is_refused(files, scenes, tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        import_onnx_model(
            files["raw"],
            tmp_path / "b",
            ImportOptions(data=scenes, size=(HEIGHT, WIDTH), classes=tmp_path / "names.txt"),
        )


def test_an_open_size_must_be_said_and_a_fixed_one_kept(files, scenes, tmp_path):
    with pytest.raises(UsageError, match="--input 640x640"):
        import_onnx_model(files["raw"], tmp_path / "b", ImportOptions(data=scenes))
    with pytest.raises(UsageError, match="the file takes 96x128 alone"):
        import_onnx_model(files["rf"], tmp_path / "b", ImportOptions(data=scenes, size=(96, 96)))


def test_rf_detr_gets_the_statistics_it_was_published_with(imported):
    kind, _, result = imported
    if kind != "softmax":  # its options give other values
        assert result.normalization.mean == ((0.485, 0.456, 0.406) if kind == "rf" else (0, 0, 0))


def test_a_decoding_that_is_not_understood_is_not_guessed(files, tmp_path, scenes):
    """The same graph with scores that are not those of its boxes."""
    model = onnx.load(files["decoded"])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.37), "third"))
    out = next(node for node in model.graph.node if "boxes" in node.output)
    out.output[0] = "boxes/before"
    model.graph.node.append(helper.make_node("Mul", ["boxes/before", "third"], ["boxes"], "odd"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="no tensor that may be the boxes gives the file's own"):
        import_onnx_model(tmp_path / "m.onnx", tmp_path / "b", ImportOptions(data=scenes, size=(HEIGHT, WIDTH)))
