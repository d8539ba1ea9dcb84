"""What goes wrong on disk: the engine that was there stays, and no half file appears."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_build import command
from tensorrt_spec.fake import FakeTensorRT

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError, EngineError
from edgedetr.runtime import onnx_bytes
from edgedetr.runtime.tensorrt import build, engine_cache


def failing_again(bundle: Bundle, fake: FakeTensorRT, error: str) -> None:
    """Build again with --force while something is wrong; the previous engine stays usable."""
    before = {path.name: path.read_bytes() for path in (bundle.path / "engines").iterdir() if path.is_file()}
    with pytest.raises(EngineError, match=error):
        build.build(bundle, force=True)
    after = {path.name: path.read_bytes() for path in (bundle.path / "engines").iterdir() if path.is_file()}
    assert after == before


def test_a_failed_build_keeps_the_previous_engine(fake, bundle):
    first = build.build(bundle)
    fake.plans, fake.parses = [None, None], [True, True]
    failing_again(bundle, fake, "returns no engine")
    assert build.build(bundle).metadata == first.metadata


@pytest.mark.parametrize("at", ["mkstemp", "fsync", "replace"])
def test_a_full_disk_is_one_error_and_keeps_the_previous_engine(old, bundle, monkeypatch, at):
    build.build(bundle)
    old.plans, old.parses = [b"new"], [True]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine_cache.tempfile if at == "mkstemp" else engine_cache.os, at, full)
    monkeypatch.setattr(engine_cache, "write_timing_cache", lambda path, data: None)
    failing_again(bundle, old, "No space left on device.*kept")


def test_a_write_that_breaks_off_in_the_middle_keeps_the_previous_engine(old, bundle):
    build.build(bundle)
    old.plans, old.parses = [b"x" * 100_000], [True]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the kernel itself cuts the write off
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
        os.seteuid(65534)  # to root every folder is writable


def test_engines_of_a_read_only_bundle_go_to_the_users_cache(old, bundle, without_root, monkeypatch):
    shutil.copytree(bundle.path, without_root / "b")
    cache = Path(tempfile.mkdtemp())
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    try:
        become_reader(without_root)
        made = build.build(without_root / "b")
        assert made.path.parent == cache / "edgedetr" / "engines"
        assert not build.build(without_root / "b").made
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(cache)


def test_nowhere_to_write_is_one_error(old, bundle, without_root, monkeypatch):
    shutil.copytree(bundle.path, without_root / "b")
    monkeypatch.setenv("XDG_CACHE_HOME", str(without_root))
    become_reader(without_root)
    with pytest.raises(EngineError, match="no folder for an engine.*set XDG_CACHE_HOME"):
        build.build(without_root / "b")


def test_too_little_space_is_said_before_the_build(old, bundle, monkeypatch):
    usage = shutil.disk_usage(bundle.path)
    monkeypatch.setattr(engine_cache.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(EngineError, match="No space left on device"):
        build.build(bundle)
    assert not old.flags


def test_a_builder_that_is_killed_leaves_the_previous_engine_and_an_open_lock(old, bundle):
    first = build.build(bundle)
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def hang(files: object) -> None:
        (first.path.parent / f".half{engine_cache.UNFINISHED}").write_bytes(b"half of a plan")
        begun.set()
        time.sleep(60)

    def child() -> None:
        engine_cache.publish, old.plans, old.parses = hang, [b"new"], [True]
        build.build(bundle, force=True)

    process = context.Process(target=child)
    process.start()
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert build.build(bundle).metadata == first.metadata
    old.plans, old.parses = [b"newer"], [True]
    assert build.build(bundle, force=True).path.read_bytes() == b"newer"
    assert not list(first.path.parent.glob(f".*{engine_cache.UNFINISHED}"))


def test_engines_of_a_graph_that_is_gone_are_named(old, bundle, tiny_graph, capsys):
    old.plans, old.parses = [b"1", b"2", b"3"], [True] * 3
    first, kept = build.build(bundle), build.build(bundle, "fp16")
    assert build.outdated(bundle) == []
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.ones((3, 6)), np.zeros((3, 2)))
    assert build.outdated(bundle) == [first.path]
    code, _, err = command(capsys, str(bundle.path))
    assert code == 0 and "engines of older graphs" in err and first.path.stem in err
    assert kept.path.is_file() and first.path.is_file()


def _build_in_process(path: str, barrier, answers) -> None:  # type: ignore[no-untyped-def]
    barrier.wait(60)
    try:
        made = build.build(path)
        answers.put((made.made, made.metadata.plan_sha256))
    except EngineError as error:
        answers.put(("failed", str(error)))


def test_a_plan_whose_metadata_are_damaged_is_not_called_outdated(old, bundle, tiny_graph):
    made = build.build(bundle)
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.ones((3, 6)), np.zeros((3, 2)))
    assert build.outdated(bundle) == [made.path]
    made.path.with_suffix(".json").write_text("{")  # nobody knows any more what it was built from
    assert build.outdated(bundle) == []


def test_a_graph_that_changes_while_it_is_read_is_not_built(old, bundle, monkeypatch):
    read = onnx_bytes.read

    def changed(path: Path, error: type[EngineError]) -> tuple[bytes, onnx_bytes.OnnxFacts]:
        model, facts = read(path, error)
        return model + b" ", facts

    monkeypatch.setattr(onnx_bytes, "read", changed)
    with pytest.raises(BundleError, match="changed while it was read"):
        build.build(bundle)
    assert old.models == []


def test_a_lock_that_cannot_be_opened_is_one_error(old, bundle):
    (bundle.path / "engines" / ".lock").mkdir(parents=True)
    with pytest.raises(EngineError, match=r"\.lock.*Is a directory"):
        build.build(bundle)


def test_timings_that_cannot_be_kept_only_cost_time(old, bundle, cache, caplog):
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "timing").write_text("a file where the folder should be")
    assert build.build(bundle).made and "are not stored" in caplog.text


def test_eight_processes_at_once_make_one_engine(old, bundle):
    context = multiprocessing.get_context("fork")  # the children inherit the fake
    barrier, answers = context.Barrier(8), context.Queue()
    children = [context.Process(target=_build_in_process, args=(str(bundle.path), barrier, answers)) for _ in range(8)]
    for child in children:
        child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert sorted(made for made, _ in found) == [False] * 7 + [True] and len({digest for _, digest in found}) == 1
    assert not list((bundle.path / "engines").glob(".*.building"))


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "no metadata", "metadata"])
def test_a_damaged_engine_is_built_again(old, bundle, harm):
    first = build.build(bundle)
    old.plans, old.parses = [b"a plan"], [True]
    target = first.path.with_suffix(".json") if "metadata" in harm else first.path
    data = target.read_bytes()
    if harm == "no metadata":
        target.unlink()
    else:
        target.write_bytes(
            {"truncate": data[:-1], "flip": bytes([data[0] ^ 1]) + data[1:], "empty": b"", "metadata": data[:40]}[harm]
        )
    again = build.build(bundle)
    assert again.made and again.path == first.path and again.path.read_bytes() == b"a plan"
    assert not build.build(bundle).made
