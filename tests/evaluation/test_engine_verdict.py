"""The verdict on engines, on a fake device whose engines compute what their graphs compute, or nearly."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.data import images, layouts
from edgedetr.errors import EngineError
from edgedetr.evaluation import engine_verdict
from edgedetr.evaluation.artifacts_run import ArtifactRun
from edgedetr.evaluation.bench import bench
from edgedetr.evaluation.reference import Reference
from edgedetr.evaluation.verdict import DeviceVerdict
from edgedetr.evaluation.verify import verify
from edgedetr.runtime import load
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.tensorrt import select
from edgedetr.runtime.tensorrt.engine_layers import LayerSummary
from edgedetr.runtime.tensorrt.trt_runner import TrtRunner

GOOD, BAD = (6.0, 6.0), (0.2, 6.0)  # how much query 0 likes red and blue
FILES = {"onnx": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}


@pytest.fixture
def fake(monkeypatch, bindings, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = fake_cuda.install(monkeypatch)
    return fake_tensorrt.install(monkeypatch, bindings.module("10.3.0"), fake)


@pytest.fixture
def bundle(make_bundle, colors, tiny_graph) -> Bundle:
    made = make_bundle(onnx=GOOD)
    dataset, detector = layouts.load(colors, "test"), load(made, stage="onnx", backend="onnxruntime", threads=1)
    found = {s.image_id: detector([images.decode(s.path)])[0] for s in dataset.samples}
    with made.add("reference.npz", stage="export") as path:
        Reference.of(dataset, found).save(path)
    return made


def build(bundle: Bundle, tiny_graph, precision: str, likes=GOOD, batch=1, **options):
    """An engine of this precision whose graph likes red and blue so much."""
    name = {"fp32": "model.onnx"}.get(precision, f"model.{precision}.onnx")
    if name != "model.onnx":
        weight = np.zeros((3, 3, 2))
        weight[0, :, 0], weight[2, :, 1] = [likes[0], 1, 0.5], [likes[1], 1, 0.5]
        # one graph for each precision; the bias makes their bytes differ and moves nothing
        bias = np.full((3, 2), -3.0 - 1e-5 * ("fp16", "int8").index(precision))
        boxes = np.array([[0.25, 0.5, 0.3, 0.6], [0.7, 0.4, 0.4, 0.4], [0.5, 0.5, 0.8, 0.2]])
        if name not in bundle.manifest.files:
            with bundle.add(name, stage="export") as path:
                tiny_graph.write(path, weight.reshape(3, -1), bias, boxes=boxes, batch="n" if batch != 1 else 1)
    return fake_tensorrt.write_plan(
        bundle.path / name,
        bundle.path / "engines" / f"{precision}-{batch}.plan",
        precision=precision,
        batch=batch,
        **options,
    )


@pytest.fixture
def speeds(monkeypatch):
    """Milliseconds by the engine's file name, instead of the clock of a busy machine."""
    milliseconds: dict[str, float] = {}
    original = ArtifactRun.__post_init__ if hasattr(ArtifactRun, "__post_init__") else None

    class Seconds(list):
        def __init__(self, run):
            super().__init__()
            self.run = run

        def append(self, value):
            super().append(
                milliseconds.get(self.run.engine.path.stem, 1000 * value) / 1000 if self.run.engine else value
            )

    def post_init(self):
        self.seconds = Seconds(self)

    assert original is None
    monkeypatch.setattr(ArtifactRun, "__init__", _with(ArtifactRun.__init__, post_init))
    return milliseconds


def _with(init, after):
    def both(self, *arguments, **named):
        init(self, *arguments, **named)
        after(self)

    return both


def test_sound_engines_pass_and_everything_is_written_down(fake, bundle, tiny_graph, speeds):
    plans = {
        p: build(bundle, tiny_graph, p, layers=LayerSummary({p: 9, "fp32": 1}, {p: 4, "fp32": 1}, 2))
        for p in ("fp16", "int8")
    }
    speeds.update({"fp16-1": 3.0, "int8-1": 2.0})
    result = verify(bundle.path)
    assert result.passed and isinstance(result, DeviceVerdict)
    assert [(s.name, s.backend, s.passed) for s in result.artifacts] == [
        ("torch", "pytorch", True),
        ("int8", "tensorrt", True),
        ("fp16", "tensorrt", True),
    ]
    int8 = result.artifacts[1]
    assert int8.ap == pytest.approx(100) and int8.drop == pytest.approx(0) and int8.note == ""
    assert int8.agreement.matched == 1.0 and int8.reference_run is None
    assert (int8.engine, int8.precision_fraction, int8.reformats, int8.rows_matched) == ("int8-1.plan", 0.8, 2, None)
    assert int8.size_mb == plans["int8"].stat().st_size / 1e6
    assert (int8.p50_ms, result.recommended) == (pytest.approx(2.0), "int8-1.plan")
    assert (result.device, result.tensorrt, result.environment) == ("Orin (sm_87)", "10.3.0", "")
    kept = bundle.path / "results" / "verify-orin-sm-87-trt10.3.0.json"
    assert json.loads(kept.read_text()) == json.loads(json.dumps(result.to_json()))
    assert not (bundle.path / "results" / "verify.json").exists()  # what the host found stays the host's
    assert "verified on this device, 2.00 ms" in load(Bundle.open(bundle.path)).description


def test_int8_that_is_not_faster_is_reported_and_fp16_is_recommended_and_loaded(fake, bundle, tiny_graph, speeds):
    for precision in ("fp16", "int8"):
        build(bundle, tiny_graph, precision)
    speeds.update({"fp16-1": 2.0, "int8-1": 2.5})
    result = verify(bundle.path)
    assert result.passed
    note = next(s.note for s in result.artifacts if s.name == "int8")
    assert note == "not faster than FP16 on this device (2.50 against 2.00 ms); FP16 is recommended"
    assert result.recommended == "fp16-1.plan"
    assert load(bundle.path).stage == "fp16"


def test_int8_alone_says_what_to_build_for_comparing(fake, bundle, tiny_graph):
    build(bundle, tiny_graph, "int8")
    assert "no FP16 engine of this batch to compare with; run: edgedetr build" in verify(bundle.path).artifacts[1].note


@pytest.mark.parametrize(
    "precision, weighted, passed, words",
    [
        ("int8", {"fp16": 10}, False, "INT8 in name only: 0 % of the layers with weights .* the others in fp16 .10."),
        ("int8", {"fp16": 9, "int8": 1}, False, "INT8 in name only: 10 %"),
        ("int8", {"fp16": 5, "int8": 5}, True, ""),
        ("fp16", {"fp32": 8, "fp16": 2}, False, "FP16 in name only: 20 % .* the others in fp32 .8."),
        ("fp16", {"fp32": 1, "fp16": 9}, True, ""),
        ("fp16", {}, True, "the precision of the engine is unknown"),
    ],
)
def test_an_engine_that_does_not_run_in_its_precision_fails(
    fake, bundle, tiny_graph, capsys, precision, weighted, passed, words
):
    build(bundle, tiny_graph, precision, layers=LayerSummary(dict(weighted), dict(weighted), 0))
    assert cli.run(["verify", str(bundle.path)]) == (0 if passed else 3)
    said = capsys.readouterr().err
    assert re.search(words, said)
    assert ("recommended: none of them" in said) is not passed


def test_an_engine_that_loses_objects_fails_and_is_not_loaded_by_itself_where_another_passes(fake, bundle, tiny_graph):
    build(bundle, tiny_graph, "int8", likes=BAD)
    build(bundle, tiny_graph, "fp16")
    result = verify(bundle.path)
    assert [s.passed for s in result.artifacts] == [True, False, True]
    assert result.artifacts[1].drop > 1
    assert result.recommended == "fp16-1.plan" and load(bundle.path).stage == "fp16"


@pytest.mark.parametrize("batch", [4, (1, 2, 4)], ids=["fixed", "open"])
@pytest.mark.parametrize("shift", [0.0, -6.0], ids=["sound", "rows differ"])
def test_equal_images_in_a_full_batch_must_give_equal_objects(fake, bundle, tiny_graph, batch, shift):
    build(bundle, tiny_graph, "int8", batch=batch)
    fake.shift = shift  # row n is off by n times this, so row 0, which is scored, is right
    artifact = verify(bundle.path).artifacts[1]
    assert artifact.ap == pytest.approx(100)
    assert artifact.name == f"int8 batch {'1.2.4' if isinstance(batch, tuple) else 4}"
    if shift:
        assert not artifact.passed and artifact.rows_matched == 0
        assert "equal images in a batch of 4 give different objects: 0 % in common" in artifact.note
    else:
        assert artifact.passed and artifact.rows_matched == 1.0


def test_an_engine_that_cannot_run_a_full_batch_has_a_fault(fake, bundle, tiny_graph, monkeypatch):
    build(bundle, tiny_graph, "int8", batch=(1, 2, 4))
    original = TrtRunner.run

    def run(self, batch):
        if len(batch) > 1:
            raise EngineError("no memory for so many")
        return original(self, batch)

    monkeypatch.setattr(TrtRunner, "run", run)
    artifact = verify(bundle.path).artifacts[1]
    assert not artifact.passed and "batch of 4: no memory for so many" in artifact.note


def test_nan_and_a_damaged_plan_are_the_engines_faults_and_the_others_are_judged(fake, bundle, tiny_graph, monkeypatch):
    damaged = build(bundle, tiny_graph, "int8")
    damaged.write_bytes(damaged.read_bytes()[:-5])
    build(bundle, tiny_graph, "fp16")
    result = verify(bundle.path)
    assert [s.passed for s in result.artifacts] == [True, False, True]
    assert "damaged or replaced" in result.artifacts[1].note
    monkeypatch.setattr(
        TrtRunner,
        "run",
        lambda self, batch: RawOutputs(np.full((1, 3, 2), np.nan, np.float32), np.zeros((1, 3, 4), np.float32)),
    )
    notes = {s.name: s.note for s in verify(bundle.path).artifacts}
    assert "NaN or infinity" in notes["fp16"] and "damaged or replaced" in notes["int8"]


def test_other_backends_can_be_asked_for_and_then_no_engine_is_touched(fake, bundle, tiny_graph, capsys):
    build(bundle, tiny_graph, "fp16")
    assert cli.run(["verify", str(bundle.path), "--backend", "onnxruntime", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {s["backend"] for s in document["stages"]} == {"pytorch", "onnxruntime"}
    assert fake.contexts == 0
    both = verify(bundle.path, backends=["onnxruntime", "tensorrt"], artifacts=["onnx", "fp16"])
    assert {s.backend for s in both.artifacts} == {"pytorch", "onnxruntime", "tensorrt"}
    assert not (bundle.path / "engines" / select.MEASURED).exists()  # only a whole verdict is recorded


def test_engines_that_do_not_fit_are_named_and_asking_for_them_is_an_error(fake, bundle, tiny_graph, caplog):
    build(bundle, tiny_graph, "fp16", tensorrt="10.16.1")
    with pytest.raises(EngineError, match="no engine that fits here; fp16-1.plan not used: built for TensorRT 10.16.1"):
        verify(bundle.path, backends=["tensorrt"])
    assert not isinstance(verify(bundle.path, artifacts=["onnx"], threads=1), DeviceVerdict)
    assert "fp16-1.plan not used" in caplog.text


def test_eval_and_predict_can_be_sent_to_an_engine(fake, bundle, tiny_graph, colors, capsys):
    assert cli.run(["eval", str(bundle.path), "--stage", "int8", "--backend", "tensorrt"]) == 1
    assert "no engine for int8 that fits here; run: edgedetr build" in capsys.readouterr().err
    build(bundle, tiny_graph, "int8")
    assert cli.run(["eval", str(bundle.path), "--stage", "int8", "--backend", "tensorrt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ap"] == pytest.approx(100)
    image = str(colors / "images" / "test" / "00.png")
    assert cli.run(["predict", str(bundle.path), image, "--backend", "tensorrt"]) == 0
    captured = capsys.readouterr()
    assert "int8 on tensorrt" in captured.err and json.loads(captured.out)["detections"][0]["class_name"] == "red"


def test_bench_times_the_engines(fake, bundle, tiny_graph, capsys):
    build(bundle, tiny_graph, "fp16")
    build(bundle, tiny_graph, "int8", batch=4)
    assert [(t.name, t.backend) for t in bench(bundle.path, rounds=2)] == [
        ("int8 batch 4", "tensorrt"),
        ("fp16", "tensorrt"),
    ]


@pytest.mark.parametrize("command", ["verify", "bench", "predict"])
def test_threads_that_engines_do_not_use_are_said(fake, bundle, tiny_graph, capsys, colors, command):
    build(bundle, tiny_graph, "fp16")
    image = [str(colors / "images" / "test" / "00.png")] if command == "predict" else []
    for threads in ([], ["--threads", "2"]):
        assert cli.run([command, str(bundle.path), *image, *threads]) == 0
        assert ("threads=2 has no effect" in capsys.readouterr().err) == bool(threads)


def test_verify_on_the_device_prints_what_is_only_known_of_engines(fake, bundle, tiny_graph, capsys, monkeypatch):
    build(bundle, tiny_graph, "int8", batch=4)
    monkeypatch.setattr(engine_verdict.jetson.Board, "conditions", lambda self: "power mode 15W (0)")
    assert cli.run(["verify", str(bundle.path)]) == 0
    said = capsys.readouterr().err
    assert "Orin (sm_87), TensorRT 10.3.0, power mode 15W (0)" in said
    assert "int8-4.plan" in said and "recommended: int8-4.plan" in said


def test_a_read_only_bundle_only_loses_the_record(fake, bundle, tiny_graph, monkeypatch, caplog):
    build(bundle, tiny_graph, "fp16")

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Bundle, "add", refuse)
    monkeypatch.setattr(select, "atomic_write", refuse)
    assert verify(bundle.path).passed
    assert caplog.text.count("could not be stored") == 2


def test_verifying_engines_needs_neither_torch_nor_onnx_nor_onnxruntime():
    code = (
        "import sys\nfor name in ('torch', 'onnx', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        "import edgedetr.evaluation.verify, edgedetr.runtime.tensorrt.select\n"
        "import edgedetr.runtime.tensorrt.selftest, edgedetr.doctor\n"
        "edgedetr.runtime.tensorrt.selftest.stored('concat')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
