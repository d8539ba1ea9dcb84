"""Members with whole frames: between preprocessing and postprocessing is the exported network; the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgedetr.bundle import Bundle
from edgedetr.cli import run
from edgedetr.exporting.config import ExportConfig
from edgedetr.exporting.export import export
from edgedetr.lint.lint import lint
from edgedetr.quantization.config import QuantConfig
from edgedetr.runtime.frame_detector import load_frames
from edgedetr.runtime.preprocess import prepare
from edgedetr.serving.frame_graph import with_frames, write_frames


@pytest.fixture
def copied(exported, tmp_path) -> Bundle:
    shutil.copytree(exported.path, tmp_path / "copied.bundle")
    return Bundle.open(tmp_path / "copied.bundle")


@pytest.fixture
def as_it_is(monkeypatch):
    """`edgedetr export` finds everything up to date: what it makes is tested elsewhere."""
    monkeypatch.setattr("edgedetr.exporting.export.export", lambda bundle, **_: bundle)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Every node unchanged, so that a graph and a part of it are computed alike."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("source", ["model.onnx", "model.fp16.onnx", "model.int8.onnx"])
def test_the_network_is_the_exported_one(copied, source):
    if source not in copied.manifest.files:
        copied = export(copied, fp16=True, config=ExportConfig(), quant=QuantConfig(images=4))
    base = onnx.load(str(copied.require(source)))
    joined = with_frames(base, copied.manifest, 150, 201)
    joined.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("images", "logits", "boxes_of_input")
    )
    frame = np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)
    images, logits, boxes = session(joined).run(["images", "logits", "boxes_of_input"], {"frames": frame[None]})
    assert np.abs(images - prepare([frame], copied.manifest.input, backend="numpy")[0]).max() <= 1
    expected = session(base).run(["logits", "boxes"], {"images": images})
    np.testing.assert_array_equal(logits, expected[0])  # the same nodes in the same order
    np.testing.assert_array_equal(boxes, expected[1])


@pytest.mark.parametrize("source", ["model.onnx", "model.int8.onnx"])
def test_lint_is_silent_about_frame_graphs(copied, source):
    name = write_frames(copied, 150, 201, [source])[0]
    findings = lint(onnx.load(str(copied.require(name))))
    assert not [finding for finding in findings if finding.node.startswith(("/frame", "/objects"))]
    assert not [finding for finding in findings if finding.worst == "error"]


def test_export_writes_frames_a_repository_and_nvinfer_files(copied, tmp_path, capsys, as_it_is):
    triton, deepstream = tmp_path / "models", tmp_path / "ds"
    code = run(
        [
            "export",
            str(copied.path),
            "--int8",
            "--frame",
            "150x201",
            "--triton",
            str(triton),
            "--deepstream",
            str(deepstream),
        ]
    )
    said = capsys.readouterr().err
    assert code == 0, said
    made = Bundle.open(copied.path)
    assert made.has("model.frame-150x201.onnx") and made.has("model.int8.frame-150x201.onnx")
    assert "model.int8.frame-150x201.onnx" in said and "onnxruntime_onnx, requests one by one" in said
    frame = np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)
    found = load_frames(made, precision="int8")(frame)
    assert len(found) and (found.xyxy[:, 2] <= 201).all() and (found.xyxy[:, 3] <= 150).all()
    assert sorted(
        str(p.relative_to(tmp_path)) for folder in (triton, deepstream) for p in folder.rglob("*") if p.is_file()
    ) == [
        "ds/config_infer_primary.txt",
        "ds/labels.txt",
        "ds/model.onnx",
        "models/copied-int8-frame-150x201/1/model.onnx",
        "models/copied-int8-frame-150x201/config.pbtxt",
        "models/copied-int8-frame-150x201/labels.txt",
    ]


def test_without_an_engine_int8_is_served_in_the_form_of_cpus(copied, tmp_path, as_it_is):
    assert run(["export", str(copied.path), "--int8", "--triton", str(tmp_path / "models")]) == 0
    text = (tmp_path / "models" / "copied-int8-cpu" / "config.pbtxt").read_text()
    assert "KIND_CPU" in text
    assert (tmp_path / "models/copied-int8-cpu/1/model.onnx").read_bytes() == copied.require(
        "model.int8-cpu.onnx"
    ).read_bytes()


@pytest.mark.parametrize("frame", [(), ("--frame", "150x201")], ids=["batches", "frames"])
def test_an_engine_that_fits_is_served(copied, tmp_path, as_it_is, monkeypatch, frame):
    from edgedetr.runtime.tensorrt import select

    asked = []
    plan = tmp_path / "int8.plan"
    plan.write_bytes(b"a plan")
    metadata = SimpleNamespace(arguments=SimpleNamespace(batch=(1, 1, 1)))
    fits = SimpleNamespace(path=plan, metadata=metadata, stage="int8", batch=1, measured=None)

    def find(bundle, files):
        asked.append(files)
        return select.EngineSearch(fitting=(fits,))

    monkeypatch.setattr(select, "find_engines", find)
    assert run(["export", str(copied.path), "--int8", *frame, "--triton", str(tmp_path / "models")]) == 0
    name, source = (
        ("copied-int8-frame-150x201", "model.int8.frame-150x201.onnx") if frame else ("copied-int8", "model.int8.onnx")
    )
    assert asked == [{"int8": source}]
    assert (tmp_path / "models" / name / "1" / "model.plan").read_bytes() == b"a plan"
    assert 'platform: "tensorrt_plan"' in (tmp_path / "models" / name / "config.pbtxt").read_text()


def test_without_tensorrt_frames_are_written_and_the_engines_left_to_the_device(copied, as_it_is, monkeypatch, capsys):
    monkeypatch.setattr("edgedetr.runtime.tensorrt.gpu.why_unavailable", lambda: "no TensorRT")
    with copied.add("model.fp16.onnx", stage="export") as temporary:
        shutil.copy(copied.require("model.onnx"), temporary)
    assert run(["export", str(copied.path), "--trt", "--frame", "150x201"]) == 0
    said = capsys.readouterr().err
    assert "model.frame-150x201.onnx, model.fp16.frame-150x201.onnx" in said
    assert "edgedetr build copied.bundle (and again with --frame 150x201)" in said
    assert Bundle.open(copied.path).has("model.fp16.frame-150x201.onnx")


def test_a_wrong_size_is_a_usage_error_before_anything_is_made(fresh, tmp_path, capsys):
    made = fresh("detr", tmp_path / "new.bundle")
    assert run(["export", str(made.path), "--frame", "1080"]) == 2
    assert "expected HEIGHTxWIDTH" in capsys.readouterr().err
    assert not (Path(made.path) / "model.onnx").exists()
