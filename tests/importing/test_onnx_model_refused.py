"""Files that cannot be imported are refused with their reason, and leave nothing behind."""

from __future__ import annotations

import os

import onnx
import pytest
from external_models import detector_of
from onnx import ModelProto, TensorProto, helper

from edgedetr import cli
from edgedetr.errors import ExportError, UsageError
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.onnx_model import import_onnx_model


def replaced(change) -> ModelProto:
    model = detector_of()
    change(model)
    return model


def _domain(model):
    model.graph.node[2].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _quantized(model):
    model.graph.node.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "p"]))


def _no_boxes(model):
    del model.graph.output[1]


def _dangling(model):
    model.graph.node[2].input[1] = "nowhere"


@pytest.mark.parametrize(
    "model, message",
    [
        (detector_of(image=(1, 32, 32, 3)), "32 channels in its second dimension; .*channels first"),
        (detector_of(image=(4, 3, 32, 32)), "takes 4 images at a time"),
        (detector_of(kind=TensorProto.FLOAT16), "input 'x' is float16; expected float32"),
        (
            detector_of(extra=(helper.make_tensor_value_info("text", TensorProto.INT64, [1, 7, 9, 9, 9]),)),
            "input text int64 .* is not known",
        ),
        (replaced(_domain), "operators that are not ONNX's own: Add \\(com.microsoft\\)"),
        (replaced(_quantized), "quantized already"),
        (replaced(_no_boxes), "the graph gives logits .*; expected one of: logits"),
        (replaced(_dangling), "not valid ONNX"),
        (detector_of(boxes=640.0), "far outside of it in every reading; expected cx, cy, w, h as fractions"),
    ],
)
def test_what_cannot_be_imported_is_said_and_leaves_nothing(tmp_path, model, message):
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=message):
        import_onnx_model(tmp_path / "m.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_smallest_file_passes(tmp_path):
    """The same file without what is refused."""
    onnx.save(detector_of(), tmp_path / "m.onnx")
    result = import_onnx_model(tmp_path / "m.onnx", tmp_path / "b", ImportOptions(activation="sigmoid"))
    assert [item.name for item in result.bundle.manifest.classes] == ["class 0", "class 1", "class 2"]


def test_a_mask_of_pixels_becomes_a_constant(tmp_path):
    """Hugging Face's DETR asks which pixels are image: here all of them are."""
    mask = helper.make_tensor_value_info("pixel_mask", TensorProto.INT64, ["batch", "height", "width"])
    model = detector_of(extra=(mask,))
    model.graph.node.insert(0, helper.make_node("Cast", ["pixel_mask"], ["f"], to=TensorProto.FLOAT))
    model.graph.node.insert(1, helper.make_node("ReduceMean", ["f"], ["share"], axes=[0, 1, 2], keepdims=0))
    model.graph.node.insert(2, helper.make_node("Mul", ["x", "share"], ["seen"]))
    model.graph.node[3].input[0] = "seen"
    onnx.save(model, tmp_path / "m.onnx")
    result = import_onnx_model(tmp_path / "m.onnx", tmp_path / "b", ImportOptions(activation="sigmoid"))
    assert [item.name for item in onnx.load(result.bundle.require("model.onnx")).graph.input] == ["images"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"{}", detector_of().SerializeToString()[:300]])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError):
        import_onnx_model(tmp_path / "m.onnx", tmp_path / "b")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_behind_a_link_are_refused(tmp_path, link):
    (tmp_path / "model").mkdir()
    onnx.save(
        detector_of(), tmp_path / "model" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert import_onnx_model(
        tmp_path / "model" / "m.onnx", tmp_path / "good", ImportOptions(activation="sigmoid")
    ).objects
    (tmp_path / "model" / "w.bin").rename(tmp_path / "elsewhere.bin")
    link(tmp_path / "elsewhere.bin", tmp_path / "model" / "w.bin")
    with pytest.raises(ExportError, match="which is a (symbolic|hard) link"):
        import_onnx_model(tmp_path / "model" / "m.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_trained_bundle_is_not_overwritten(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights.safetensors").write_bytes(b"years")
    onnx.save(detector_of(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="holds a trained model"):
        import_onnx_model(tmp_path / "m.onnx", tmp_path / "b")


@pytest.mark.parametrize(
    "words, message",
    [
        (["m.onnx", "--model", "detr"], "--model is for weights"),
        (["w.safetensors", "--model", "detr", "--mean", "0", "0", "0"], "--mean is for an ONNX file"),
        (["w.safetensors"], "weights need --model"),
        (["m.onnx", "--input", "640"], "expected HEIGHTxWIDTH"),
        (["m.onnx", "--std", "0", "1", "1"], "std"),
    ],
)
def test_wrong_words_are_refused(tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(detector_of(), tmp_path / "m.onnx")
    assert cli.run(["import", *words, "--out", "b"]) == 2
    assert message in capsys.readouterr().err
