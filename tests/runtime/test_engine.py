"""Engines are built as asked, kept when they fit, and a failure leaves what was there; TensorRT is a specified fake."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from tensorrt_spec.fake import FakeTensorRT

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError, DeviceError, EngineError, MissingDependency, UsageError
from edgedetr.runtime import cudart, engine, engine_store, nvidia
from edgedetr.runtime.cudart import Device

ORIN = Device("Orin", 87, 8 << 30, True, "12.6", "12.6")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgedetr"


@pytest.fixture
def fake(trt: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """A device with one version of TensorRT; every test runs on all versions."""
    return install(trt, monkeypatch)


@pytest.fixture
def old(bindings: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """JetPack 6."""
    return install(bindings.module("10.3.0"), monkeypatch)


def install(spec: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    made = FakeTensorRT(spec)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    monkeypatch.setattr(cudart, "probe", lambda: ORIN)
    return made


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle("model.onnx", "model.fp16.onnx", "model.int8.onnx")


def test_an_engine_is_built_strongly_typed_and_its_sidecar_says_everything(fake, bundle):
    made = engine.build(bundle)
    assert made.made and made.path.read_bytes() == b"a plan"
    told = made.sidecar
    assert fake.flags == [1 << int(fake.spec.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    assert fake.models == [(bundle.path / "model.int8.onnx").read_bytes()]
    assert (told.onnx, told.onnx_sha256) == ("model.int8.onnx", bundle.manifest.files["model.int8.onnx"].sha256)
    assert (told.tensorrt, told.cuda, told.sm, told.device) == (fake.spec.__version__, "12.6", 87, "Orin")
    assert told.layers.weighted == {"int8": 1} and told.layers.share("int8") == 1 and told.typing == "strong"
    assert json.loads(made.path.with_suffix(".layers.json").read_text())["Layers"]
    assert made.path.name.startswith(f"int8-b1-sm87-trt{fake.spec.__version__}-cu12.6-orin-{told.onnx_sha256:.8}-")
    assert not list(made.path.parent.glob(".*.building"))


def test_the_builder_is_configured_by_name(fake, bundle):
    engine.build(bundle, workspace_mb=512, optimization_level=5)
    config = fake.configs[0]
    config.set_memory_pool_limit.assert_called_once_with(fake.spec.MemoryPoolType.WORKSPACE, 512 << 20)
    assert config.profiling_verbosity is fake.spec.ProfilingVerbosity.DETAILED
    assert config.builder_optimization_level == 5
    config.set_flag.assert_not_called()         # FP16 and INT8 flags contradict strong typing
    config.clear_flag.assert_not_called()
    config.add_optimization_profile.assert_not_called()


def test_a_float32_engine_does_not_round_to_tf32(fake, bundle):
    engine.build(bundle, "fp32")
    fake.configs[0].clear_flag.assert_called_once_with(fake.spec.BuilderFlag.TF32)


@pytest.mark.parametrize("total, integrated, expected", [(8 << 30, True, 1024), (64 << 30, True, 4096),
                                                        (4 << 30, True, 512), (80 << 30, False, 4096)])
def test_a_board_keeps_memory_for_everything_else(old, bundle, monkeypatch, total, integrated, expected):
    device = dataclasses.replace(ORIN, total_bytes=total, integrated=integrated)
    monkeypatch.setattr(cudart, "probe", lambda: device)
    assert engine.build(bundle).sidecar.arguments.workspace_mb == expected


def test_an_engine_that_fits_is_kept_and_force_builds_it_again(fake, bundle):
    first = engine.build(bundle)
    again = engine.build(bundle)                # the fake has one plan only: a second build would fail
    assert (first.made, again.made) == (True, False) and again.sidecar == first.sidecar
    fake.plans = [b"another plan"]
    assert engine.build(bundle, force=True).path.read_bytes() == b"another plan"


def test_other_arguments_graphs_and_precisions_are_other_engines(fake, bundle):
    fake.plans, fake.parses = [b"1", b"2", b"3"], [True] * 3
    made = [engine.build(bundle), engine.build(bundle, optimization_level=4), engine.build(bundle, "fp16")]
    assert len({one.path for one in made}) == 3 and len(engine_store.plans(bundle)) == 3


def test_parser_errors_arrive_whole_with_node_names(fake, bundle):
    fake.parses = [False, False]
    fake.errors = [("/decoder/0/Add", "Add", "types differ"), ("/neck/Conv", "Conv", "no kernel")]
    with pytest.raises(EngineError) as caught:
        engine.build(bundle)
    for word in ("/decoder/0/Add (Add): types differ", "/neck/Conv (Conv): no kernel", "model.int8.onnx", "Orin",
                 "edgedetr lint"):
        assert word in str(caught.value)
    assert not engine_store.plans(bundle)


def test_a_build_that_gives_nothing_repeats_what_tensorrt_said(fake, bundle):
    fake.plans = [None, None]
    fake.said = [("ERROR", "no tactic for node 7"), ("WARNING", "unrelated"), ("INTERNAL_ERROR", "assertion")]
    with pytest.raises(EngineError, match="no tactic for node 7\n  assertion") as caught:
        engine.build(bundle)
    assert "unrelated" not in str(caught.value)


def test_out_of_memory_names_the_workspace(fake, bundle):
    fake.plans, fake.said = [None, None], [("ERROR", "Skipping tactic: insufficient memory on requested 900 MB")]
    with pytest.raises(EngineError, match="--workspace 1024 MB"):
        engine.build(bundle)


def test_weak_typing_stands_in_on_10_3_alone(fake, bundle):
    fake.plans = [None, b"weak plan"]
    if not fake.spec.__version__.startswith("10.3"):
        with pytest.raises(EngineError, match="strongly typed"):
            engine.build(bundle)
        return
    made = engine.build(bundle)
    flag = fake.spec.BuilderFlag
    assert made.sidecar.typing == "weak" and made.path.read_bytes() == b"weak plan" and fake.flags[1] == 0
    assert [call.args[0] for call in fake.configs[1].set_flag.call_args_list] == [flag.FP16, flag.INT8]
    assert "could not be built strongly typed" in made.sidecar.warnings[0]


def test_weak_typing_is_built_where_it_exists_and_refused_where_not(fake, bundle):
    if hasattr(fake.spec.BuilderFlag, "INT8"):
        assert engine.build(bundle, "fp16", typing="weak").sidecar.typing == "weak"
        fake.configs[0].set_flag.assert_called_once_with(fake.spec.BuilderFlag.FP16)
    else:
        with pytest.raises(EngineError, match="no weakly typed networks any more"):
            engine.build(bundle, "fp16", typing="weak")


def test_an_open_batch_size_gets_one_profile(fake, make_bundle):
    bundle = make_bundle("model.int8.onnx", batch="B")
    fake.inputs, fake.plans, fake.parses = {"images": (-1, 3, 32, 48)}, [b"1", b"2"], [True, True]
    made = engine.build(bundle, batch=(1, 4, 8))
    fake.profiles[0].set_shape.assert_called_once_with("images", (1, 3, 32, 48), (4, 3, 32, 48), (8, 3, 32, 48))
    fake.configs[0].add_optimization_profile.assert_called_once_with(fake.profiles[0])
    assert made.path.name.startswith("int8-b1.4.8-")
    static = engine.build(bundle, batch=4)
    fake.profiles[1].set_shape.assert_called_once_with("images", *[(4, 3, 32, 48)] * 3)
    assert static.path.name.startswith("int8-b4-")


def test_a_refused_profile_and_an_open_picture_size_are_errors(fake, make_bundle):
    bundle = make_bundle("model.int8.onnx", batch="B")
    fake.inputs, fake.profile_index = {"images": (-1, 3, 32, 48)}, -1
    with pytest.raises(EngineError, match="refuses batch sizes 1, 2, 4"):
        engine.build(bundle, batch=(1, 2, 4))
    fake.inputs, fake.parses = {"images": (-1, 3, -1, -1)}, [True]
    with pytest.raises(EngineError, match="sizes besides the batch are open"):
        engine.build(bundle, batch=2)


@pytest.mark.parametrize("batch", [4, (1, 1, 4)])
def test_a_graph_for_one_picture_names_the_export_that_opens_the_batch(fake, bundle, batch):
    with pytest.raises(UsageError, match="takes batches of 1 only.*edgedetr export .* --dynamic-batch --int8"):
        engine.build(bundle, batch=batch)
    assert not fake.flags


@pytest.mark.parametrize("words", [{"precision": "int4"}, {"typing": "strog"}, {"batch": 0}, {"batch": (4, 2, 8)},
                                   {"batch": 5000}, {"optimization_level": 6}, {"workspace_mb": 1},
                                   {"workspace_mb": 1 << 20}])
def test_words_that_mean_nothing_are_usage_errors(old, bundle, words):
    with pytest.raises(UsageError, match="expected"):
        engine.build(bundle, **words)


def test_progress_hears_the_outermost_phases(fake, bundle):
    heard = []
    engine.build(bundle, progress=lambda what, done, total: heard.append((what, done, total)))
    assert heard == [("build: Building", 0, 2), ("build: Building", 1, 2), ("build: Building", 2, 2),
                     ("build: Building", 2, 2)]
    assert not any(fake.stopped)


def test_ctrl_c_stops_the_build_and_not_the_process(fake, bundle):
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.build(bundle, progress=interrupt)
    assert all(fake.stopped) and not engine_store.plans(bundle)


def test_a_version_without_a_progress_monitor_builds_without_progress(old, bundle):
    del old.module.IProgressMonitor
    heard = []
    assert engine.build(bundle, progress=lambda *words: heard.append(words)).made and not heard


def test_timings_are_kept_for_the_next_build_on_this_device(fake, bundle, cache):
    fake.plans, fake.parses = [b"1", b"2"], [True, True]
    engine.build(bundle)
    where = list((cache / "timing").iterdir())
    assert [path.name for path in where] == [f"orin-sm87-trt{fake.spec.__version__}-cu12.6.cache"]
    assert where[0].read_bytes() == b"timings after "
    engine.build(bundle, "fp16")
    fake.configs[1].create_timing_cache.assert_called_once_with(b"timings after ")


def test_timings_that_do_not_fit_are_left_out(fake, bundle, cache, caplog):
    path = engine_store.timing_cache_path(ORIN, fake.spec.__version__)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of another world")
    fake.timing_cache_fits = False
    assert engine.build(bundle).made and "not usable" in caplog.text
    assert [call.args[0] for call in fake.configs[0].create_timing_cache.call_args_list] == [b"of another world", b""]


def test_timings_behind_a_link_are_not_read(fake, bundle, cache, tmp_path, caplog):
    path = engine_store.timing_cache_path(ORIN, fake.spec.__version__)
    path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(b"x")
    path.symlink_to(tmp_path / "elsewhere")
    assert engine.build(bundle).made and "symbolic link" in caplog.text


def test_an_engine_that_cannot_be_loaded_is_not_kept(fake, bundle):
    fake.loads = False
    with pytest.raises(EngineError, match="built an engine that it cannot load"):
        engine.build(bundle)
    assert not engine_store.plans(bundle)


def test_an_unreadable_answer_of_the_inspector_is_an_error(fake, bundle):
    fake.inspector = "not json"
    with pytest.raises(EngineError, match="inspector"):
        engine.build(bundle)
    assert not engine_store.plans(bundle)


def test_a_builder_that_does_not_start_is_one_error(old, bundle):
    def refuse(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")     # what the bindings raise

    old.module.Builder = refuse
    with pytest.raises(EngineError, match="does not start here"):
        engine.build(bundle)


def test_without_tensorrt_the_error_says_where_to_build(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="TensorRT is not installed.*apt install.*run: edgedetr build"):
        engine.build(bundle)
    assert "not installed" in engine.available()


@pytest.mark.parametrize("error", [ImportError("libnvdla_compiler.so: cannot open shared object file"), OSError("x")])
def test_a_tensorrt_that_cannot_be_loaded_says_which_library(monkeypatch, error):
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "tensorrt":
                raise error

    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingDependency, match=f"cannot be loaded .{error}"):
        nvidia.tensorrt()


def test_another_package_of_that_name_is_not_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(MissingDependency, match="is not NVIDIA's"):
        nvidia.tensorrt()


def test_without_a_driver_tensorrt_is_never_started(old, bundle, monkeypatch):
    def no_driver() -> Device:
        raise DeviceError("no NVIDIA driver: libcuda.so.1 is not here")

    monkeypatch.setattr(cudart, "probe", no_driver)
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        engine.build(bundle)
    assert not old.flags and "no NVIDIA driver" in engine.available()


def test_available_says_nothing_where_engines_can_be_built(fake):
    assert engine.available() is None


def test_a_graph_that_has_not_been_made_names_its_command(old, make_bundle):
    with pytest.raises(BundleError, match="model.int8.onnx has not been made yet; run: edgedetr export"):
        engine.build(make_bundle("model.onnx"))


@pytest.mark.parametrize("harm, words", [
    (lambda path, other: path.symlink_to(other), "symbolic link"),
    (lambda path, other: os.link(other, path), "2 names"),
])
def test_a_graph_that_is_a_link_never_reaches_tensorrt(old, bundle, tmp_path, harm, words):
    path, other = bundle.path / "model.int8.onnx", tmp_path / "other.onnx"
    path.rename(other)
    harm(path, other)           # the bytes are the recorded ones; the link could be turned while they are read
    with pytest.raises(EngineError, match=words):
        engine.build(bundle)
    assert not old.flags


def test_a_graph_with_weights_elsewhere_never_reaches_tensorrt(old, bundle, tiny_graph):
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)))
        model = onnx.load(path)
        model.graph.initializer[0].ClearField("raw_data")
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer[0].external_data.add(key="location", value="../../secrets")
        path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="keeps weights in another file .'../../secrets'"):
        engine.build(bundle)
    assert not old.flags


def frames_graph(path: Path) -> None:
    value, floats, integers = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    nodes = [onnx.helper.make_node("Cast", ["frames"], [name], to=kind)
             for name, kind in (("boxes", floats), ("scores", floats), ("labels", integers))]
    outputs = [value("boxes", floats, None), value("scores", floats, None), value("labels", integers, None)]
    graph = onnx.helper.make_graph(nodes, "g", [value("frames", onnx.TensorProto.UINT8, [1, 48, 64, 3])], outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)]), str(path))


def test_the_engine_for_whole_frames_is_built_from_its_own_graph(fake, bundle, capsys):
    with bundle.add("model.int8.frame-48x64.onnx", stage="export --frame") as path:
        frames_graph(path)
    fake.inputs = {"frames": (1, 48, 64, 3)}
    made = engine.build(bundle, frame=(48, 64))
    assert made.sidecar.onnx == "model.int8.frame-48x64.onnx"
    assert fake.models == [(bundle.path / made.sidecar.onnx).read_bytes()]
    code, out, _ = command(capsys, str(bundle.path), "--frame", "48x64", "--precision", "int8", "--json")
    assert code == 0 and json.loads(out)[0]["path"] == str(made.path) and not json.loads(out)[0]["made"]
    with pytest.raises(UsageError, match="one frame at a time"):
        engine.build(bundle, frame=(48, 64), batch=2)
    with pytest.raises(BundleError, match="no fp16 graph for frames of 48x64; run: .* --frame 48x64 --trt"):
        engine.build(bundle, "fp16", frame=(48, 64))


def test_a_graph_with_other_inputs_is_refused(old, bundle, tiny_graph):
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)), names=("a", "b"))
    with pytest.raises(BundleError, match="expected images -> logits, boxes"):
        engine.build(bundle)


# What goes wrong on disk. The engine that was there must stay, and no half file may appear.


def failing_again(bundle: Bundle, fake: FakeTensorRT, error: str) -> None:
    """Build again with --force while something is wrong; the previous engine stays usable."""
    before = {path.name: path.read_bytes() for path in (bundle.path / "engines").iterdir() if path.is_file()}
    with pytest.raises(EngineError, match=error):
        engine.build(bundle, force=True)
    after = {path.name: path.read_bytes() for path in (bundle.path / "engines").iterdir() if path.is_file()}
    assert after == before


def test_a_failed_build_keeps_the_previous_engine(fake, bundle):
    first = engine.build(bundle)
    fake.plans, fake.parses = [None, None], [True, True]
    failing_again(bundle, fake, "gives no engine")
    assert engine.build(bundle).sidecar == first.sidecar


@pytest.mark.parametrize("at", ["mkstemp", "fsync", "replace"])
def test_a_full_disk_is_one_error_and_keeps_the_previous_engine(old, bundle, monkeypatch, at):
    engine.build(bundle)
    old.plans, old.parses = [b"new"], [True]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine_store.tempfile if at == "mkstemp" else engine_store.os, at, full)
    monkeypatch.setattr(engine_store, "write_timing_cache", lambda path, data: None)
    failing_again(bundle, old, "No space left on device.*kept")


def test_a_write_that_breaks_off_in_the_middle_keeps_the_previous_engine(old, bundle):
    engine.build(bundle)
    old.plans, old.parses = [b"x" * 100_000], [True]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))      # the kernel itself cuts the write off
    try:
        failing_again(bundle, old, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def without_root() -> Iterator[Path]:
    """A folder of root's in which this process, for the time of a test, may only read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    os.seteuid(os.getuid())
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def become_reader(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.getuid() == 0:
        os.seteuid(65534)       # to root every folder is writable


def test_engines_of_a_read_only_bundle_go_to_the_users_cache(old, bundle, without_root, monkeypatch):
    shutil.copytree(bundle.path, without_root / "b")
    cache = Path(tempfile.mkdtemp())
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    try:
        become_reader(without_root)
        made = engine.build(without_root / "b")
        assert made.path.parent == cache / "edgedetr" / "engines"
        assert not engine.build(without_root / "b").made
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(cache)


def test_nowhere_to_write_is_one_error(old, bundle, without_root, monkeypatch):
    shutil.copytree(bundle.path, without_root / "b")
    monkeypatch.setenv("XDG_CACHE_HOME", str(without_root))
    become_reader(without_root)
    with pytest.raises(EngineError, match="no place for an engine.*set XDG_CACHE_HOME"):
        engine.build(without_root / "b")


def test_too_little_space_is_said_before_the_build(old, bundle, monkeypatch):
    usage = shutil.disk_usage(bundle.path)
    monkeypatch.setattr(engine_store.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(EngineError, match="No space left on device"):
        engine.build(bundle)
    assert not old.flags


def test_a_builder_that_is_killed_leaves_the_previous_engine_and_an_open_lock(old, bundle):
    first = engine.build(bundle)
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def hang(files: object) -> None:
        (first.path.parent / f".half{engine_store.UNFINISHED}").write_bytes(b"half of a plan")
        begun.set()
        time.sleep(60)

    def child() -> None:
        engine_store.publish, old.plans, old.parses = hang, [b"new"], [True]
        engine.build(bundle, force=True)

    process = context.Process(target=child)
    process.start()
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert engine.build(bundle).sidecar == first.sidecar
    old.plans, old.parses = [b"newer"], [True]
    assert engine.build(bundle, force=True).path.read_bytes() == b"newer"
    assert not list(first.path.parent.glob(f".*{engine_store.UNFINISHED}"))


def test_engines_of_a_graph_that_is_gone_are_named(old, bundle, tiny_graph, capsys):
    old.plans, old.parses = [b"1", b"2", b"3"], [True] * 3
    first, kept = engine.build(bundle), engine.build(bundle, "fp16")
    assert engine.outdated(bundle) == []
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.ones((3, 6)), np.zeros((3, 2)))
    assert engine.outdated(bundle) == [first.path]
    code, _, err = command(capsys, str(bundle.path))
    assert code == 0 and "engines of graphs that are gone" in err and first.path.stem in err
    assert kept.path.is_file() and first.path.is_file()


def _build_in_process(path: str, barrier, answers) -> None:    # type: ignore[no-untyped-def]
    barrier.wait(60)
    try:
        made = engine.build(path)
        answers.put((made.made, made.sidecar.plan_sha256))
    except EngineError as error:
        answers.put(("failed", str(error)))


def test_eight_processes_at_once_make_one_engine(old, bundle):
    context = multiprocessing.get_context("fork")       # the children inherit the fake
    barrier, answers = context.Barrier(8), context.Queue()
    children = [context.Process(target=_build_in_process, args=(str(bundle.path), barrier, answers)) for _ in range(8)]
    for child in children:
        child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert sorted(made for made, _ in found) == [False] * 7 + [True] and len({digest for _, digest in found}) == 1
    assert not list((bundle.path / "engines").glob(".*.building"))


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "no sidecar", "sidecar"])
def test_a_damaged_engine_is_built_again(old, bundle, harm):
    first = engine.build(bundle)
    old.plans, old.parses = [b"a plan"], [True]
    target = first.path.with_suffix(".json") if "sidecar" in harm else first.path
    data = target.read_bytes()
    if harm == "no sidecar":
        target.unlink()
    else:
        target.write_bytes({"truncate": data[:-1], "flip": bytes([data[0] ^ 1]) + data[1:], "empty": b"",
                            "sidecar": data[:40]}[harm])
    again = engine.build(bundle)
    assert again.made and again.path == first.path and again.path.read_bytes() == b"a plan"
    assert not engine.build(bundle).made


def test_known_defects_are_said_and_a_certainly_wrong_graph_is_refused(bindings, bundle, cache, monkeypatch):
    from edgedetr.runtime import known_bad

    install(bindings.module("10.3.0"), monkeypatch)
    entry = known_bad.KnownBad("x", (("10.3", "10.4"),), "it is slow", "wait", "https://example.org")
    monkeypatch.setattr(known_bad, "entries", lambda: (entry,))
    assert engine.build(bundle).sidecar.warnings == ("it is slow; wait (https://example.org)",)
    monkeypatch.setattr(known_bad, "entries", lambda: (dataclasses.replace(entry, refuse=True),))
    with pytest.raises(EngineError, match="it is slow; wait"):
        engine.build(bundle, force=True)


def test_hints_for_failures_are_only_said_then(bindings, bundle, cache, monkeypatch):
    from edgedetr.runtime import known_bad

    fake = install(bindings.module("11.4.0"), monkeypatch)
    fake.plans, fake.parses = [b"plan", None], [True, True]
    entry = known_bad.KnownBad("x", (("11", "12"),), "needs more", "give it", "https://example.org", on_failure=True)
    monkeypatch.setattr(known_bad, "entries", lambda: (entry,))
    assert engine.build(bundle).sidecar.warnings == ()
    with pytest.raises(EngineError, match="known: needs more; give it"):
        engine.build(bundle, force=True)


# The command.


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from edgedetr.cli import run

    code = run(["build", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_build_makes_every_precision_there_is_and_prints_what_became_of_it(fake, bundle, capsys):
    fake.plans, fake.parses = [b"half", b"eight"], [True, True]
    code, out, err = command(capsys, str(bundle.path), "--json")
    assert code == 0 and [made["arguments"]["precision"] for made in json.loads(out)] == ["fp16", "int8"]
    assert all(made["made"] and Path(made["path"]).is_file() for made in json.loads(out))
    assert "100 %" in err and f"next: edgedetr verify {bundle.path}" in err
    code, out, err = command(capsys, str(bundle.path))
    assert code == 0 and out == "" and err.count("kept") == 2


def test_build_options_reach_the_builder(fake, make_bundle, capsys):
    bundle = make_bundle("model.onnx", batch="B")
    fake.inputs, fake.plans, fake.parses = {"images": (-1, 3, 32, 48)}, [b"1", b"2", b"3"], [True] * 3
    words = ["--precision", "fp32", "--workspace", "200", "--optimization-level", "1", "--typing", "strong", "--json"]
    code, out, _ = command(capsys, str(bundle.path), *words, "--batch", "1", "--batch", "4")
    assert code == 0 and [made["arguments"]["batch"] for made in json.loads(out)] == [[1, 1, 1], [4, 4, 4]]
    code, out, _ = command(capsys, str(bundle.path), *words, "--dynamic", "1,4,8")
    told = json.loads(out)[0]["arguments"]
    assert code == 0 and told == {"precision": "fp32", "batch": [1, 4, 8], "workspace_mb": 200,
                                  "optimization_level": 1, "typing": "strong"}


@pytest.mark.parametrize("words, said", [
    (["--batch", "2", "--dynamic", "1,2,4"], "exclude each other"), (["--dynamic", "1,2"], "expected three numbers"),
    (["--dynamic", "4,2,1"], "ascending"), (["--batch", "0"], "0 is not in the range"),
    (["--precision", "int4"], "int4"), (["--frame", "1080p"], "as in 1080x1920"),
    (["--workspace", "1"], "expected from 64 to the 8192 MB of Orin"),
])
def test_wrong_words_exit_2(old, bundle, capsys, words, said):
    code, out, err = command(capsys, str(bundle.path), *words)
    assert code == 2 and said in err and out == "" and not old.flags


def test_build_without_tensorrt_is_one_error_that_says_where_to_run_it(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, out, err = command(capsys, str(bundle.path))
    assert code == 1 and out == "" and "TensorRT is not installed here" in err and "Traceback" not in err
    assert f"copy {bundle.path} there and run: edgedetr build {bundle.path}" in err


def test_warnings_of_known_defects_reach_the_reader(old, bundle, capsys, monkeypatch):
    from edgedetr.runtime import known_bad

    entry = known_bad.KnownBad("x", (("10.3", "10.4"),), "it is slow", "wait", "https://example.org")
    monkeypatch.setattr(known_bad, "entries", lambda: (entry,))
    assert "it is slow; wait (https://example.org)" in command(capsys, str(bundle.path), "--precision", "int8")[2]
