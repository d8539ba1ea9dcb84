"""Files for DeepStream: the configuration against its graph, and the shipped parser's algorithm as reference."""

from __future__ import annotations

import configparser
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import patch_detector
import pytest
from onnx import TensorProto, numpy_helper
from patch_detector import smooth

from edgedetr.bundle import InputContract
from edgedetr.errors import ExportError
from edgedetr.runtime import load
from edgedetr.runtime.preprocess import prepare
from edgedetr.serving.deepstream import OUTPUTS, write_deepstream

STRETCH, LETTERBOX = InputContract(64, 96), InputContract(96, 64, "letterbox")


def read(path: Path) -> configparser.ConfigParser:
    """The key file as GLib reads it: `#` starts a comment, names keep their case, nothing is interpolated."""
    found = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",), delimiters=("=",), strict=True)
    found.optionxform = str
    found.read_string(path.read_text(encoding="utf-8"))
    return found


def nvinfer_input(frames: np.ndarray, config: configparser.ConfigParser) -> np.ndarray:
    """What nvinfer hands to the network: y = net-scale-factor * (x - offset) of RGB planes [B, 3, H, W]."""
    part = config["property"]
    assert part["model-color-format"] == "0"
    offsets = np.array([float(value) for value in part["offsets"].split(";")], np.float32)
    return np.float32(part["net-scale-factor"]) * (frames.astype(np.float32) - offsets[:, None, None])


def ssd_parser(outputs: dict[str, np.ndarray], width: int, height: int, thresholds: list[float]) -> list[tuple]:
    """One image as NvDsInferParseCustomTfSSD reads it: class, confidence, left, top, width, height of each object."""
    assert all(value.dtype == np.float32 for value in outputs.values())
    scores, classes, boxes = (outputs[name] for name in OUTPUTS[2:] + OUTPUTS[1:2])
    count = max(0, min(int(outputs["num_detections"][0]), classes.shape[0]))
    objects = []
    for i in range(count):
        confidence, label = float(scores[i]), int(classes[i])
        if label >= len(thresholds) or confidence < thresholds[label]:
            continue
        y1, x1, y2, x2 = (boxes[i] * np.float32([height, width, height, width])).tolist()
        x1, x2 = (max(min(value, width - 1), 0.0) for value in (x1, x2))
        y1, y2 = (max(min(value, height - 1), 0.0) for value in (y1, y2))
        if x2 > x1 and y2 > y1:
            objects.append((label, confidence, x1, y1, x2 - x1, y2 - y1))
    return objects


def run(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {session.get_inputs()[0].name: images})))


@pytest.mark.parametrize("contract", [STRETCH, LETTERBOX], ids=lambda contract: contract.resize)
@pytest.mark.parametrize("frame", [None, (130, 190)], ids=str)
def test_the_configuration_matches_the_graph(tmp_path, contract, frame):
    made = patch_detector.bundle(tmp_path / "b", contract=contract)
    files = write_deepstream(made, tmp_path / "ds", frame=frame)
    config = read(files.config)["property"]
    model = onnx.load(str(files.config.parent / config["onnx-file"]))
    onnx.checker.check_model(model, full_check=True)
    taken = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert taken[1:] == [int(value) for value in config["infer-dims"].split(";")]
    assert taken[2:] == list(frame or (contract.height, contract.width))
    assert taken[0] == int(config["batch-size"]) == 1
    assert [output.name for output in model.graph.output] == config["output-blob-names"].split(";") == list(OUTPUTS)
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {TensorProto.FLOAT}
    assert config["maintain-aspect-ratio"] == str(int(contract.resize == "letterbox" and frame is None))
    assert (config["symmetric-padding"], config["cluster-mode"], config["network-type"]) == ("0", "4", "0")
    labels = (files.config.parent / config["labelfile-path"]).read_text().splitlines()
    assert len(labels) == int(config["num-detected-classes"]) == 3
    assert labels == ["class, 0", "class, 1", "class, 2"]  # nvinfer splits a line at semicolons
    assert config["parse-bbox-func-name"] == "NvDsInferParseCustomTfSSD"
    assert Path(config["custom-lib-path"]).name == "libnvds_infercustomparser.so"


@pytest.mark.parametrize("contract", [STRETCH, LETTERBOX], ids=lambda contract: contract.resize)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_parser_finds_the_boxes_of_our_decode(tmp_path, contract, activation):
    """Without --frame nvinfer resizes; here frames have the input's size, so that nothing is resized."""
    made = patch_detector.bundle(tmp_path / "b", contract=contract, activation=activation)
    files = write_deepstream(made, tmp_path / "ds")
    config, seen = read(files.config), 0
    for seed in range(4):
        frame = smooth((contract.height, contract.width), seed)
        outputs = run(files.model, nvinfer_input(frame.transpose(2, 0, 1)[None], config))
        seen += same_objects(made, frame, {name: value[0] for name, value in outputs.items()}, config)
    assert seen > 20


@pytest.mark.parametrize("contract", [STRETCH, LETTERBOX], ids=lambda contract: contract.resize)
@pytest.mark.parametrize("size", [(130, 190), (300, 210)], ids=str)
def test_with_a_whole_frame_the_resize_is_in_the_graph(tmp_path, contract, size):
    made = patch_detector.bundle(tmp_path / "b", contract=contract)
    files = write_deepstream(made, tmp_path / "ds", frame=size)
    config, seen = read(files.config), 0
    for seed in range(3):
        frame = smooth(size, seed)
        outputs = run(files.model, nvinfer_input(frame.transpose(2, 0, 1)[None], config))
        seen += same_objects(made, frame, {name: value[0] for name, value in outputs.items()}, config)
    assert seen > 20


def same_objects(made, frame: np.ndarray, outputs: dict[str, np.ndarray], config: configparser.ConfigParser) -> int:
    """Compare the parser's objects with those of our detector above the same threshold; how many there were."""
    height, width = frame.shape[:2]
    threshold = float(config["class-attrs-all"]["pre-cluster-threshold"])
    found = ssd_parser(outputs, width, height, [threshold] * 3)
    ours = load(made, backend="onnxruntime", stage="onnx")([frame])[0].above(threshold)
    clipped = np.clip(ours.xyxy, 0, [width - 1, height - 1] * 2)  # the parser knows pixels up to the last one
    keep = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    assert [label for label, *_ in found] == ours.class_id[keep].tolist()
    # OpenCV's resize rounds once more than the graph's: see test_frame.within.
    np.testing.assert_allclose([item[1] for item in found], ours.confidence[keep], atol=1e-3)
    sides = np.array([item[2:] for item in found]).reshape(-1, 4)
    corners = np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1)
    np.testing.assert_allclose(corners, clipped[keep], atol=2e-3 * max(height, width))
    return len(found)


def test_the_number_of_detections_leaves_out_scores_of_zero(tmp_path):
    made = patch_detector.bundle(tmp_path / "b", classes=1, top_k=16)
    with made.add("model.onnx", stage="export") as temporary:
        patch_detector.write(temporary, made.manifest.input, 1)
        model = onnx.load(str(temporary))
        spread = next(item for item in model.graph.initializer if item.name == "spread")
        value = numpy_helper.to_array(spread).copy()
        value[0, 5:, 0] = -1e4  # sigmoid: exactly 0
        spread.CopyFrom(numpy_helper.from_array(value, "spread"))
        temporary.write_bytes(model.SerializeToString())
    files = write_deepstream(made, tmp_path / "ds")
    outputs = run(files.model, prepare([smooth((64, 96))], made.manifest.input)[0])
    assert outputs["num_detections"].tolist() == [[5.0]]
    assert (outputs["detection_scores"][0, :5] > 0).all()


def test_an_open_batch_stays_open(tmp_path):
    made = patch_detector.bundle(tmp_path / "b", batch="batch")
    files = write_deepstream(made, tmp_path / "ds")
    frames = np.stack([smooth((64, 96), seed).transpose(2, 0, 1) for seed in range(3)]).astype(np.float32)
    together = run(files.model, frames)
    for row in range(3):
        alone = run(files.model, frames[row : row + 1])
        for name in OUTPUTS:
            np.testing.assert_allclose(together[name][row], alone[name][0], atol=1e-6)  # float32, other kernels


@pytest.mark.parametrize("source, mode", [("model.onnx", "0"), ("model.int8.onnx", "1"), ("model.fp16.onnx", "2")])
def test_the_precision_is_that_of_the_graph(tmp_path, source, mode):
    made = patch_detector.bundle(tmp_path / "b", files=("model.onnx", "model.int8.onnx", "model.fp16.onnx"))
    text = write_deepstream(made, tmp_path / "ds", source).config.read_text()
    assert read(tmp_path / "ds" / "config_infer_primary.txt")["property"]["network-mode"] == mode
    assert "--stronglyTyped" in text


def test_a_letterbox_without_frame_is_warned_about(tmp_path, caplog):
    made = patch_detector.bundle(tmp_path / "b", contract=LETTERBOX)
    with caplog.at_level(logging.WARNING):
        write_deepstream(made, tmp_path / "ds")
    assert "--frame HxW" in caplog.text
    caplog.clear()
    write_deepstream(made, tmp_path / "ds", frame=(100, 100))
    assert not caplog.text


def test_more_detections_than_tensorrt_can_select_are_refused(tmp_path):
    made = patch_detector.bundle(tmp_path / "b", top_k=4000)
    with pytest.raises(ExportError, match="at most 3840"):
        write_deepstream(made, tmp_path / "ds")
