"""export --trt: everything up to the engine, kept; then an engine, or the machine that builds it (--strict: exit 4)."""

from __future__ import annotations

import json
import os

import onnx
import pytest

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.exporting.config import ExportConfig
from edgedetr.exporting.export import export
from edgedetr.quantization.config import QuantConfig
from edgedetr.runtime.tensorrt import build as engine
from edgedetr.runtime.tensorrt import gpu


@pytest.fixture(scope="module")
def prepared(fresh, tmp_path_factory) -> Bundle:
    """A detr with model.onnx, model.fp16.onnx and the INT8 graphs."""
    bundle = fresh("detr", tmp_path_factory.mktemp("trt") / "b.bundle")
    return export(bundle, int8=True, fp16=True, config=ExportConfig(), quant=QuantConfig(images=8))


def test_the_fp16_graph_is_made_from_the_float_graph_and_says_what_stayed_float32(prepared):
    files = prepared.manifest.files
    assert files["model.fp16.onnx"].made_from == {"model.onnx": files["model.onnx"].sha256}
    metadata = {item.key: item.value for item in onnx.load(str(prepared.require("model.fp16.onnx"))).metadata_props}
    assert json.loads(metadata["edgedetr.quantisation"])["dialect"] == "fp16"
    reasons = json.loads(metadata["edgedetr.float32_nodes"])
    assert any("boxes" in reason for reason in reasons)
    assert "edgedetr.classes" in metadata  # what model.onnx says of itself stays


@pytest.mark.parametrize("strict, code", [([], 0), (["--strict"], 4)])
def test_without_tensorrt_the_graphs_stay_and_only_strict_exits_with_4(prepared, strict, code, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "why_unavailable", lambda: "tensorrt is not installed")
    before = {name: os.stat(prepared.path / name).st_mtime_ns for name in ("model.onnx", "model.fp16.onnx")}
    assert cli.run(["export", str(prepared.path), "--trt", *strict]) == code
    said = capsys.readouterr().err
    assert "the engines are not" in said and "tensorrt is not installed" in said
    assert "run: edgedetr build b.bundle" in said
    after = {name: os.stat(prepared.path / name).st_mtime_ns for name in before}
    assert after == before  # like make: what is up to date is kept
    assert all(Bundle.open(prepared.path).has(name) for name in before)


def test_where_tensorrt_is_the_engines_are_built(prepared, capsys, monkeypatch):
    built = []

    class Made:
        path, made = prepared.path / "engines" / "x.plan", True

    def build(bundle, precision, **options):
        built.append((bundle.path, precision))
        return Made()

    monkeypatch.setattr(gpu, "why_unavailable", lambda: "")
    monkeypatch.setattr(engine, "build", build)
    assert cli.run(["export", str(prepared.path), "--trt"]) == 0
    assert built == [(prepared.path, "fp16")]
    assert "x.plan" in capsys.readouterr().err


def test_another_float_graph_makes_the_fp16_graph_stale(prepared, tmp_path):
    import shutil

    copy = shutil.copytree(prepared.path, tmp_path / "copy.bundle")
    bundle = Bundle.open(copy)
    with bundle.add("model.onnx", stage="export", made_from=["weights.safetensors"]) as path:
        model = onnx.load(str(copy / "model.onnx"))
        model.doc_string = "another"
        path.write_bytes(model.SerializeToString())
    assert not bundle.has("model.fp16.onnx")
