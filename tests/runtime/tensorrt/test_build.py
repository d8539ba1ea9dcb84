"""Engines are built as asked and kept when they fit; TensorRT is a specified fake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
from engine_build import ORIN, command

from edgedetr.errors import BundleError, EngineError, UsageError
from edgedetr.runtime.tensorrt import build, engine_cache, gpu


def test_an_engine_is_built_strongly_typed_and_its_metadata_are_complete(fake, bundle):
    made = build.build(bundle)
    assert made.made and made.path.read_bytes() == b"a plan"
    metadata = made.metadata
    assert fake.flags == [1 << int(fake.spec.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    assert fake.models == [(bundle.path / "model.int8.onnx").read_bytes()]
    assert (metadata.onnx, metadata.onnx_sha256) == ("model.int8.onnx", bundle.manifest.files["model.int8.onnx"].sha256)
    assert (metadata.tensorrt, metadata.cuda, metadata.sm, metadata.device) == (
        fake.spec.__version__,
        "12.6",
        87,
        "Orin",
    )
    assert (
        metadata.layers.weighted == {"int8": 1}
        and metadata.layers.fraction("int8") == 1
        and metadata.typing == "strong"
    )
    assert json.loads(made.path.with_suffix(".layers.json").read_text())["Layers"]
    assert made.path.name.startswith(f"int8-b1-sm87-trt{fake.spec.__version__}-cu12.6-orin-{metadata.onnx_sha256:.8}-")
    assert not list(made.path.parent.glob(".*.building"))


def test_the_builder_is_configured_by_name(fake, bundle):
    build.build(bundle, workspace_mb=512, optimization_level=5)
    config = fake.configs[0]
    config.set_memory_pool_limit.assert_called_once_with(fake.spec.MemoryPoolType.WORKSPACE, 512 << 20)
    assert config.profiling_verbosity is fake.spec.ProfilingVerbosity.DETAILED
    assert config.builder_optimization_level == 5
    config.set_flag.assert_not_called()  # FP16 and INT8 flags contradict strong typing
    config.clear_flag.assert_not_called()
    config.add_optimization_profile.assert_not_called()


def test_a_float32_engine_does_not_round_to_tf32(fake, bundle):
    build.build(bundle, "fp32")
    fake.configs[0].clear_flag.assert_called_once_with(fake.spec.BuilderFlag.TF32)


@pytest.mark.parametrize(
    "total, integrated, expected",
    [(8 << 30, True, 1024), (64 << 30, True, 4096), (4 << 30, True, 512), (80 << 30, False, 4096)],
)
def test_a_board_keeps_memory_for_everything_else(old, bundle, monkeypatch, total, integrated, expected):
    device = dataclasses.replace(ORIN, total_bytes=total, integrated=integrated)
    monkeypatch.setattr(gpu, "probe", lambda: device)
    assert build.build(bundle).metadata.arguments.workspace_mb == expected


def test_an_engine_that_fits_is_kept_and_force_builds_it_again(fake, bundle):
    first = build.build(bundle)
    again = build.build(bundle)  # the fake has one plan only: a second build would fail
    assert (first.made, again.made) == (True, False) and again.metadata == first.metadata
    fake.plans = [b"another plan"]
    assert build.build(bundle, force=True).path.read_bytes() == b"another plan"


def test_other_arguments_graphs_and_precisions_are_other_engines(fake, bundle):
    fake.plans, fake.parses = [b"1", b"2", b"3"], [True] * 3
    made = [build.build(bundle), build.build(bundle, optimization_level=4), build.build(bundle, "fp16")]
    assert len({one.path for one in made}) == 3 and len(engine_cache.plans(bundle)) == 3


def test_parser_errors_arrive_whole_with_node_names(fake, bundle):
    fake.parses = [False, False]
    fake.errors = [("/decoder/0/Add", "Add", "types differ"), ("/neck/Conv", "Conv", "no kernel")]
    with pytest.raises(EngineError) as caught:
        build.build(bundle)
    for word in (
        "/decoder/0/Add (Add): types differ",
        "/neck/Conv (Conv): no kernel",
        "model.int8.onnx",
        "Orin",
        "edgedetr lint",
    ):
        assert word in str(caught.value)
    assert not engine_cache.plans(bundle)


def test_a_build_that_gives_nothing_repeats_what_tensorrt_said(fake, bundle):
    fake.plans = [None, None]
    fake.said = [("ERROR", "no tactic for node 7"), ("WARNING", "unrelated"), ("INTERNAL_ERROR", "assertion")]
    with pytest.raises(EngineError, match="no tactic for node 7\n  assertion") as caught:
        build.build(bundle)
    assert "unrelated" not in str(caught.value)


def test_out_of_memory_names_the_workspace(fake, bundle):
    fake.plans, fake.said = [None, None], [("ERROR", "Skipping tactic: insufficient memory on requested 900 MB")]
    with pytest.raises(EngineError, match="--workspace 1024 MB"):
        build.build(bundle)


def test_weak_typing_is_the_fallback_on_10_3_alone(fake, bundle):
    fake.plans = [None, b"weak plan"]
    if not fake.spec.__version__.startswith("10.3"):
        with pytest.raises(EngineError, match="strongly typed"):
            build.build(bundle)
        return
    made = build.build(bundle)
    flag = fake.spec.BuilderFlag
    assert made.metadata.typing == "weak" and made.path.read_bytes() == b"weak plan" and fake.flags[1] == 0
    assert [call.args[0] for call in fake.configs[1].set_flag.call_args_list] == [flag.FP16, flag.INT8]
    assert "could not be built strongly typed" in made.metadata.warnings[0]


def test_weak_typing_is_built_where_it_exists_and_refused_where_not(fake, bundle):
    if hasattr(fake.spec.BuilderFlag, "INT8"):
        assert build.build(bundle, "fp16", typing="weak").metadata.typing == "weak"
        fake.configs[0].set_flag.assert_called_once_with(fake.spec.BuilderFlag.FP16)
    else:
        with pytest.raises(EngineError, match="no weakly typed networks any more"):
            build.build(bundle, "fp16", typing="weak")


def test_an_open_batch_size_gets_one_profile(fake, make_bundle):
    bundle = make_bundle("model.int8.onnx", batch="B")
    fake.inputs, fake.plans, fake.parses = {"images": (-1, 3, 32, 48)}, [b"1", b"2"], [True, True]
    made = build.build(bundle, batch=(1, 4, 8))
    fake.profiles[0].set_shape.assert_called_once_with("images", (1, 3, 32, 48), (4, 3, 32, 48), (8, 3, 32, 48))
    fake.configs[0].add_optimization_profile.assert_called_once_with(fake.profiles[0])
    assert made.path.name.startswith("int8-b1.4.8-")
    static = build.build(bundle, batch=4)
    fake.profiles[1].set_shape.assert_called_once_with("images", *[(4, 3, 32, 48)] * 3)
    assert static.path.name.startswith("int8-b4-")


def test_a_refused_profile_and_an_open_image_size_are_errors(fake, make_bundle):
    bundle = make_bundle("model.int8.onnx", batch="B")
    fake.inputs, fake.profile_index = {"images": (-1, 3, 32, 48)}, -1
    with pytest.raises(EngineError, match="rejects batch sizes 1, 2, 4"):
        build.build(bundle, batch=(1, 2, 4))
    fake.inputs, fake.parses = {"images": (-1, 3, -1, -1)}, [True]
    with pytest.raises(EngineError, match="sizes other than the batch size are dynamic"):
        build.build(bundle, batch=2)


@pytest.mark.parametrize("batch", [4, (1, 1, 4)])
def test_a_graph_for_one_image_names_the_export_that_opens_the_batch(fake, bundle, batch):
    with pytest.raises(UsageError, match="takes batches of 1 only.*edgedetr export .* --int8 --dynamic-batch"):
        build.build(bundle, batch=batch)
    assert not fake.flags


@pytest.mark.parametrize(
    "words",
    [
        {"precision": "int4"},
        {"typing": "strog"},
        {"batch": 0},
        {"batch": (4, 2, 8)},
        {"batch": 5000},
        {"optimization_level": 6},
        {"workspace_mb": 1},
        {"workspace_mb": 1 << 20},
    ],
)
def test_words_that_mean_nothing_are_usage_errors(old, bundle, words):
    with pytest.raises(UsageError, match="expected"):
        build.build(bundle, **words)


def test_progress_hears_the_outermost_phases(fake, bundle):
    heard = []
    build.build(bundle, progress=lambda what, done, total: heard.append((what, done, total)))
    assert heard == [
        ("build: Building", 0, 2),
        ("build: Building", 1, 2),
        ("build: Building", 2, 2),
        ("build: Building", 2, 2),
    ]
    assert not any(fake.stopped)


def test_ctrl_c_stops_the_build_and_not_the_process(fake, bundle):
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build(bundle, progress=interrupt)
    assert all(fake.stopped) and not engine_cache.plans(bundle)


def test_a_version_without_a_progress_monitor_builds_without_progress(old, bundle):
    del old.module.IProgressMonitor
    heard = []
    assert build.build(bundle, progress=lambda *words: heard.append(words)).made and not heard


def test_timings_are_kept_for_the_next_build_on_this_device(fake, bundle, cache):
    fake.plans, fake.parses = [b"1", b"2"], [True, True]
    build.build(bundle)
    where = list((cache / "timing").iterdir())
    assert [path.name for path in where] == [f"orin-sm87-trt{fake.spec.__version__}-cu12.6.cache"]
    assert where[0].read_bytes() == b"timings after "
    build.build(bundle, "fp16")
    fake.configs[1].create_timing_cache.assert_called_once_with(b"timings after ")


def test_timings_that_do_not_fit_are_left_out(fake, bundle, cache, caplog):
    path = engine_cache.timing_cache_path(ORIN, fake.spec.__version__)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of another world")
    fake.timing_cache_fits = False
    assert build.build(bundle).made and "not usable" in caplog.text
    assert [call.args[0] for call in fake.configs[0].create_timing_cache.call_args_list] == [b"of another world", b""]


def test_a_builder_without_timings_builds_and_keeps_none(fake, bundle, cache, caplog):
    fake.timing_caches = False
    assert build.build(bundle).made and not caplog.text
    fake.configs[0].set_timing_cache.assert_not_called()
    assert not engine_cache.timing_cache_path(ORIN, fake.spec.__version__).exists()


def test_timings_behind_a_link_are_not_read(fake, bundle, cache, tmp_path, caplog):
    path = engine_cache.timing_cache_path(ORIN, fake.spec.__version__)
    path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(b"x")
    path.symlink_to(tmp_path / "elsewhere")
    assert build.build(bundle).made and "symbolic link" in caplog.text


def frames_graph(path: Path) -> None:
    value, floats, integers = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    nodes = [
        onnx.helper.make_node("Cast", ["frames"], [name], to=kind)
        for name, kind in (("boxes", floats), ("scores", floats), ("labels", integers))
    ]
    outputs = [value("boxes", floats, None), value("scores", floats, None), value("labels", integers, None)]
    graph = onnx.helper.make_graph(nodes, "g", [value("frames", onnx.TensorProto.UINT8, [1, 48, 64, 3])], outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)]), str(path))


def test_the_engine_for_whole_frames_is_built_from_its_own_graph(fake, bundle, capsys):
    with bundle.add("model.int8.frame-48x64.onnx", stage="export --frame") as path:
        frames_graph(path)
    fake.inputs = {"frames": (1, 48, 64, 3)}
    made = build.build(bundle, frame=(48, 64))
    assert made.metadata.onnx == "model.int8.frame-48x64.onnx"
    assert fake.models == [(bundle.path / made.metadata.onnx).read_bytes()]
    code, out, _ = command(capsys, str(bundle.path), "--frame", "48x64", "--precision", "int8", "--json")
    assert code == 0 and json.loads(out)[0]["path"] == str(made.path) and not json.loads(out)[0]["made"]
    with pytest.raises(UsageError, match="one frame at a time"):
        build.build(bundle, frame=(48, 64), batch=2)
    with pytest.raises(BundleError, match="no fp16 graph for frames of 48x64; run: .* --trt --frame 48x64"):
        build.build(bundle, "fp16", frame=(48, 64))
