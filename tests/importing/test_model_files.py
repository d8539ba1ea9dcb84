"""config.json and preprocessor_config.json next to an external ONNX file are read and reported, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from planted_onnx import BOXES, LABELS, SIZE, corners, labeled, planted

from edgedetr import cli
from edgedetr.errors import ExportError, UsageError
from edgedetr.importing.import_options import ImportOptions, Normalization
from edgedetr.importing.onnx_model import import_onnx_model, read_model_files
from edgedetr.runtime.bundle_detector import load

pytest.importorskip("torch")
NAMES = {"0": "red", "1": "green", "2": "blue"}


def folder(path: Path, model: onnx.ModelProto | None = None, **files: dict | str) -> Path:
    """A file with JSON next to it; returns the file."""
    path.mkdir(parents=True, exist_ok=True)
    if model is not None:
        onnx.save(model, path / "model.onnx")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / {"config": "config.json", "processor": "preprocessor_config.json"}[name]).write_text(text)
    return path / "model.onnx"


def test_a_softmax_detector_is_known_by_its_configuration(tmp_path, capsys):
    """Without data, without options: DETR's "no object" is no class, and classes have their names."""
    made = planted(softmax=True)
    made.constants["l0"][..., -1] -= 5.6  # the logits of noise do not reveal softmax
    path = folder(tmp_path / "m", made.model(["l", "b"]), config={"model_type": "detr", "id2label": NAMES})
    assert cli.run(["import", str(path), "--out", str(tmp_path / "b")]) == 0
    err = capsys.readouterr().err
    assert "config.json has model_type detr: softmax" in err
    assert "3 class names are those of config.json" in err
    detector = load(tmp_path / "b", backend="onnxruntime", stage="onnx", threads=1)
    found = detector([np.zeros((64, 96, 3), np.uint8)])[0]
    assert found.data["class_name"][:6].tolist() == [("red", "green", "blue")[label] for label in LABELS]
    np.testing.assert_allclose(found.xyxy[:6], np.clip(corners(BOXES) * SIZE, 0, SIZE), atol=0.2)


@pytest.mark.parametrize("kind, count", [("rt_detr", 3), ("d_fine", 3), ("rf_detr", 3), ("deformable_detr", 3)])
def test_a_sigmoid_detector_is_known_by_its_configuration(tmp_path, kind, count):
    path = folder(tmp_path / "m", planted(quiet=-0.5).model(["l", "b"]), config={"model_type": kind, "id2label": NAMES})
    result = import_onnx_model(path, tmp_path / "b")
    assert result.activation == "sigmoid"
    assert [item.name for item in result.bundle.manifest.classes] == ["red", "green", "blue"]


def test_a_configuration_that_does_not_fit_the_graph_is_refused(tmp_path):
    model = planted(quiet=-0.5).model(["l", "b"])
    path = folder(tmp_path / "m", model, config={"model_type": "detr", "id2label": NAMES})
    with pytest.raises(UsageError, match="2 class logits besides no object"):
        import_onnx_model(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_classes_of_the_data_set_are_found_by_name(tmp_path):
    data = labeled(tmp_path / "data")
    order = {"0": "red", "1": "blue", "2": "green"}
    made = planted()
    made.constants["l0"] = made.constants["l0"][..., [0, 2, 1]]
    path = folder(tmp_path / "m", made.model(["l", "b"]), config={"id2label": order})
    result = import_onnx_model(path, tmp_path / "b", ImportOptions(data=data))
    assert [item.name for item in result.bundle.manifest.classes] == ["red", "green", "blue"]
    assert result.ap is not None and result.ap > 95
    other = folder(tmp_path / "n", made.model(["l", "b"]), config={"id2label": {**order, "1": "cat"}})
    with pytest.raises(UsageError, match="config.json does not name blue.*--columns index"):
        import_onnx_model(other, tmp_path / "c", ImportOptions(data=data))
    assert import_onnx_model(other, tmp_path / "c", ImportOptions(data=data, columns="index")).ap < 60


def test_the_processor_says_pixels_and_size_and_options_go_over_it(tmp_path, capsys):
    model = planted().model(["l", "b"])
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    processor = {
        "do_resize": True,
        "size": {"height": 64, "width": 96},
        "do_rescale": True,
        "rescale_factor": 0.5,
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
        "image_processor_type": "RTDetrImageProcessor",
        "sharpen": 2,
    }
    path = folder(tmp_path / "m", model, processor=processor)
    words = ["import", str(path), "--out", str(tmp_path / "b"), "--std", "1", "1", "2"]
    assert cli.run([*words, "--activation", "sigmoid", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["pixels"] == {"scale": 0.5, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 2], "resize": "stretch"}
    assert "not read: sharpen" in captured.err
    assert "resample 3 is not kept" in captured.err
    sides = onnx.load(tmp_path / "b" / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in sides] == [1, 3, 64, 96]


@pytest.mark.parametrize(
    "processor, expected, resize",
    [
        ({"do_rescale": False, "do_normalize": False}, 1.0, "stretch"),
        ({"do_normalize": False, "size": 640}, 1 / 255, "stretch"),
        ({"do_normalize": False, "size": 800, "max_size": 1333}, 1 / 255, "letterbox"),
        ({"do_normalize": False, "size": {"shortest_edge": 800, "longest_edge": 1333}}, 1 / 255, "letterbox"),
        ({"do_normalize": False, "size": {"max_height": 400, "max_width": 600}}, 1 / 255, "letterbox"),
    ],
)
def test_each_form_of_a_processor(tmp_path, processor, expected, resize):
    found = read_model_files(folder(tmp_path, processor=processor)).normalization
    assert found is not None
    assert found.scale == pytest.approx(expected)
    assert found.resize == resize


def test_a_whole_processor_holds_that_of_images(tmp_path):
    (tmp_path / "processor_config.json").write_text(
        json.dumps(
            {
                "image_processor": {
                    "do_rescale": False,
                    "image_processor_type": "RTDetrImageProcessorFast",
                    "image_mean": [1, 1, 1],
                    "image_std": [2, 2, 2],
                }
            }
        )
    )
    assert read_model_files(tmp_path / "m.onnx").normalization == Normalization(1.0)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"processor": {"do_center_crop": True}}, "do_center_crop is true"),
        ({"processor": {"do_flip_channel_order": True}}, "do_flip_channel_order is true"),
        ({"processor": {"do_normalize": True}}, "do_normalize is true without image_mean"),
        (
            {"processor": {"image_mean": [1, 2], "image_std": [1, 1, 1]}},
            "image_mean is .* expected three numbers, of R, G and B",
        ),
        ({"processor": {"rescale_factor": "1/255"}}, 'rescale_factor is "1/255"; expected a positive number'),
        ({"processor": {"size": {"width": 3}}}, "size is .*; expected shortest_edge"),
        ({"processor": {"size": {"height": 0, "width": 3}}}, "size: height is 0; expected pixels"),
        ({"processor": "{"}, "preprocessor_config.json.*JSON"),
        ({"config": "["}, "config.json.*JSON"),
        ({"config": {"id2label": ["a"]}}, "id2label is a list; expected a name for each class"),
        ({"config": {"id2label": {"0": "a", "2": "b"}}}, "id2label has 2 entries, which are not those from 0 to 1"),
        ({"config": {"id2label": {"0": "a", "1": "a"}}}, "one name twice"),
        ({"config": {"id2label": {"0": "a", "1": "b"}, "num_labels": 3}}, "num_labels is 3, and id2label names 2"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_key(tmp_path, files, message):
    with pytest.raises(ExportError, match=message):
        read_model_files(folder(tmp_path, **files))


def test_names_that_were_never_filled_in_say_nothing(tmp_path):
    assert read_model_files(folder(tmp_path, config={"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})).names is None
    assert read_model_files(folder(tmp_path, config=[1])).names is None  # another program's
    holes = {"0": "N/A", "1": "person"}
    assert read_model_files(folder(tmp_path, config={"id2label": holes})).names == ("-", "person")


def test_the_folder_above_one_called_onnx_counts(tmp_path):
    folder(tmp_path, config={"model_type": "detr", "id2label": NAMES})
    assert read_model_files(folder(tmp_path / "onnx")).model_type == "detr"
    assert read_model_files(folder(tmp_path / "other")).model_type is None
