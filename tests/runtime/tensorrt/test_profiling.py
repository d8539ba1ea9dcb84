"""`edgedetr build --profile`: times of layers are joined with the inspector's words, written and read back."""

from __future__ import annotations

import hashlib
import json
import sys

import fake_tensorrt
import pytest
from engine_build import command

from edgedetr.artifacts import INT8_PROFILED, PROFILE
from edgedetr.errors import BundleError, EngineError
from edgedetr.runtime.tensorrt import build, profiling
from edgedetr.runtime.tensorrt.build import BuiltEngine, SerializedEngine
from edgedetr.runtime.tensorrt.layer_profile import EngineTimes, LayerProfile, layer_times

LAYERS = [
    {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "t", "Dimensions": [1, 8, 4, 4], "Format/Datatype": "Row major Int8 format"}],
        "Outputs": [{"Name": "u", "Dimensions": [1, 8, 4, 4], "Format/Datatype": "Row major linear FP16 format"}],
        "Metadata": "[ONNX Layer: /conv]\x1e[ONNX Layer: /relu]",
    },
    {
        "Name": "Reformatting CopyNode for Input Tensor 0 to conv + relu",
        "LayerType": "Reformat",
        "Inputs": [{"Name": "images", "Dimensions": [1, 3, 32, 48], "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "t", "Dimensions": [1, 3, 32, 48], "Format/Datatype": "Row major Int8 format"}],
        "Metadata": "",
    },
    {"Name": "never timed", "LayerType": "Constant", "Inputs": [], "Outputs": [], "Metadata": ""},
]
INSPECTED = json.dumps({"Layers": LAYERS, "Bindings": ["images"]})


def test_times_are_joined_with_what_the_inspector_says():
    """Median 2 and error 1.2533 x 1.4826 x 1 / sqrt(5), worked out by hand."""
    runs = [{"conv + relu": ms, LAYERS[1]["Name"]: 0.5, "__myl_Fc_1": 0.25} for ms in (1.0, 2.0, 3.0, 0.9, 90.0)]
    conv, reformat, other = layer_times(INSPECTED, runs)
    assert (conv.nodes, conv.reformats, conv.source, conv.target) == (("/conv", "/relu"), False, "int8", "fp16")
    assert conv.ms == 2.0 and conv.error_ms == pytest.approx(1.2533 * 1.4826 / 5**0.5)
    # A reformat belongs to the layer it converts for; its size and types say what it converts.
    assert (reformat.nodes, reformat.reformats, reformat.tensor) == (("/conv", "/relu"), True, "images")
    assert (reformat.source, reformat.target, reformat.elements, reformat.ms) == ("fp32", "int8", 3 * 32 * 48, 0.5)
    assert (other.name, other.kind, other.nodes, other.ms) == ("__myl_Fc_1", "", (), 0.25)


@pytest.mark.parametrize("runs", [[], [{}], [{"a layer of another engine": 1.0}]])
def test_layers_that_the_inspector_does_not_list_are_one_error(runs):
    with pytest.raises(EngineError, match=r"none of which the engine inspector lists.*edgedetr build BUNDLE --profile"):
        layer_times(INSPECTED, runs)


@pytest.fixture
def profiled(make_bundle, behavior, cache, monkeypatch):
    """A bundle with both graphs on a fake device, whose builder answers with the graphs themselves."""
    bundle = make_bundle("model.onnx", "model.fp16.onnx", INT8_PROFILED.file)
    half = fake_tensorrt.write_plan(bundle.path / "model.fp16.onnx", bundle.path / "engines/half.plan")
    half.with_suffix(".layers.json").write_text(INSPECTED)
    metadata = build.engine_metadata.read(half)
    asked = {}

    def built(opened, precision, **options):
        asked.update(precision=precision, **options)
        return BuiltEngine(half, metadata, True)

    def serialized(model, arguments, device, **options):
        asked.update(arguments=arguments)
        return SerializedEngine(model, INSPECTED, b"", "strong", 1.0)

    monkeypatch.setattr(build, "build", built)
    monkeypatch.setattr(build, "build_serialized", serialized)
    behavior.layers = {"conv + relu": 0.75, LAYERS[1]["Name"]: 0.125}
    return bundle, behavior, asked


def test_a_profile_has_both_engines_what_they_ran_on_and_the_digests_of_their_graphs(profiled):
    bundle, behavior, asked = profiled
    heard = []
    found = profiling.profile(
        bundle, workspace_mb=256, rounds=4, progress=lambda what, done, total: heard.append((what, done, total))
    )
    assert asked["precision"] == "fp16" and asked["workspace_mb"] == 256
    assert asked["arguments"].precision == "int8" and asked["arguments"].batch == (1, 1, 1)
    assert behavior.executed == 2 * (profiling.WARM_UP + 4) and heard[-1] == ("profile", 4, 4)
    assert "cudaGraphLaunch" not in behavior.fake.log and not any(behavior.fake.live().values())
    for engine, name in ((found.float, "model.fp16.onnx"), (found.int8, INT8_PROFILED.file)):
        digest = hashlib.sha256((bundle.path / name).read_bytes()).hexdigest()
        assert (engine.onnx, engine.onnx_sha256) == (name, digest)
        assert (engine.ms, engine.reformat_ms) == (0.875, 0.125)
    assert (found.runs, found.tensorrt) == (4, sys.modules["tensorrt"].__version__)
    assert LayerProfile.load(bundle.require(PROFILE.file)) == found


def test_an_engine_whose_layers_are_not_described_is_one_error(profiled):
    bundle, *_ = profiled
    (bundle.path / "engines/half.layers.json").unlink()
    with pytest.raises(EngineError, match=r"half.layers.json: cannot be read.*edgedetr build BUNDLE --profile --force"):
        profiling.profile(bundle, rounds=1)
    assert PROFILE.file not in bundle.manifest.files


def test_a_damaged_profile_is_one_error_with_the_next_command(tmp_path):
    engine = EngineTimes("model.onnx", "0" * 64, "strong", layer_times(INSPECTED, [{"conv + relu": 1.0}]))
    path, profile = tmp_path / "profile.json", LayerProfile("Orin", 87, "10.3.0", "12.6", "", 1, engine, engine)
    profile.save(path)
    assert LayerProfile.load(path) == profile
    raw = json.loads(path.read_text())
    wrong = [[], {}, {**raw, "schema": 2}, {**raw, "runs": "4"}, {**raw, "more": 1}, {**raw, "int8": None}]
    layer = raw["int8"]["layers"][0]
    changes = [
        {"ms": -1.0},
        {"ms": float("nan")},
        {"nodes": [3]},
        {"reformats": 1},
        {"elements": True},
        {"name": "x" * 99_999},
    ]
    wrong += [{**raw, "int8": {**raw["int8"], "layers": [{**layer, **change}]}} for change in changes]
    wrong.append({**raw, "float": {**raw["float"], "layers": []}})
    for content in wrong:
        path.write_text(json.dumps(content))
        with pytest.raises(BundleError, match="edgedetr build BUNDLE --profile"):
            LayerProfile.load(path)


def test_the_command_prints_the_engines_and_what_to_run_next(profiled, capsys):
    bundle, *_ = profiled
    code, out, err = command(capsys, str(bundle.path), "--profile", "--json")
    assert code == 0 and json.loads(out)["float"]["layers"][0]["nodes"] == ["/conv", "/relu"]
    assert "0.875" in err and "0.125" in err and PROFILE.file in err
    assert "edgedetr export tiny.bundle --int8 --max-drop POINTS --target tensorrt" in err


def test_without_the_graph_the_command_that_makes_it_is_named(bundle, old, capsys):
    code, _, err = command(capsys, str(bundle.path), "--profile")
    assert code == 1 and f"run: edgedetr export {bundle.path} --int8 --max-drop POINTS --target tensorrt" in err


def test_without_tensorrt_the_command_for_the_device_is_named(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, err = command(capsys, str(bundle.path), "--profile")
    assert code == 1 and f"run: edgedetr build {bundle.path} --profile" in err


@pytest.mark.parametrize(
    "words", [["--precision", "int8"], ["--batch", "1"], ["--dynamic", "1,2,4"], ["--frame", "32x48"]]
)
def test_options_that_a_profile_does_not_have_are_refused(bundle, capsys, words):
    code, _, err = command(capsys, str(bundle.path), "--profile", *words)
    assert code == 2 and "leave --precision, --batch, --dynamic and --frame out" in err
