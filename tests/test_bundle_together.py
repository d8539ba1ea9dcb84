"""Several commands on one bundle: nothing is lost, one training at a time, and a killed one blocks nobody."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import BundleError, TrainingError
from edgedetr.storage import atomic, locks


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle.create(
        tmp_path / "b.bundle", Manifest("rt_detr", (ClassInfo(0, 1, "cell"),), InputContract(32, 32), OutputContract())
    )


def put(bundle, name, text, made_from=()):
    with bundle.add(name, stage="test", made_from=made_from) as path:
        path.write_text(text)


def start(script: str, *arguments: object) -> subprocess.Popen:
    """A Python process that has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline().strip() == "ready", process.stderr.read()
    return process


ADD = """
    import sys
    from edgedetr.bundle import Bundle
    bundle = Bundle.open(sys.argv[1])       # each has its own copy of bundle.json from before the others begin
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(10):
        with bundle.add(f"{sys.argv[2]}-{number}", stage=sys.argv[2]) as path:
            path.write_text(sys.argv[2])
    bundle.update(**{sys.argv[3]: {"budget": 0.25, "synthetic": True}[sys.argv[3]]})
"""


def test_commands_side_by_side_lose_no_entry_and_no_change(bundle):
    put(bundle, "model.onnx", "graph")
    running = [
        start(ADD, bundle.path, name, field)
        for name, field in (("export", "budget"), ("trt", "synthetic"), ("verify", "budget"))
    ]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        assert process.wait(60) == 0, process.stderr.read()
    opened = Bundle.open(bundle.path)
    assert set(opened.manifest.files) == {"model.onnx"} | {
        f"{name}-{n}" for name in ("export", "trt", "verify") for n in range(10)
    }
    assert all(opened.has(name) for name in opened.manifest.files)
    assert (opened.manifest.budget, opened.manifest.synthetic) == (0.25, True)
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", *opened.manifest.files}


def test_what_another_command_made_is_seen_without_opening_again(bundle):
    other = Bundle.open(bundle.path)
    put(other, "model.onnx", "graph")
    assert bundle.has("model.onnx")
    put(other, "model.onnx", "another graph")
    assert bundle.require("model.onnx").read_text() == "another graph"


def test_a_file_made_from_what_was_replaced_meanwhile_is_stale_and_not_taken_for_new(bundle):
    put(bundle, "weights.safetensors", "old")
    bundle.require("weights.safetensors")  # this command reads the old ones
    put(Bundle.open(bundle.path), "weights.safetensors", "new")
    put(bundle, "ranges.json", "unrelated")  # so that this object's manifest knows of the new ones
    put(bundle, "model.onnx", "of the old", made_from=["weights.safetensors"])
    with pytest.raises(BundleError, match=r"model\.onnx was made from weights\.safetensors"):
        Bundle.open(bundle.path).require("model.onnx")


HOLD = """
    import os, sys, time
    from edgedetr.bundle import Bundle
    with Bundle.training(sys.argv[1]) if sys.argv[2] == "train" else Bundle.open(sys.argv[1])._lock():
        if sys.argv[3] == "fork" and os.fork() == 0:
            print("ready", flush=True)
            time.sleep(60)
        if sys.argv[3] != "fork":
            print("ready", flush=True)
        time.sleep(60)
"""


def test_a_second_training_is_refused_at_once_with_the_first_ones_process(bundle):
    process = start(HOLD, bundle.path, "train", "")
    begun = time.monotonic()
    with (
        pytest.raises(TrainingError, match=rf"another training writes here \(process {process.pid}\)"),
        Bundle.training(bundle.path),
    ):
        pass
    assert time.monotonic() - begun < 2
    put(bundle, "model.onnx", "graph")  # whoever exports meanwhile is not held up
    process.kill()
    process.communicate()


@pytest.mark.parametrize("kind", ["train", "change"])
def test_a_killed_owner_blocks_nobody(bundle, kind):
    process = start(HOLD, bundle.path, kind, "")
    process.kill()
    process.communicate()
    with Bundle.training(bundle.path):
        put(bundle, "model.onnx", "graph")
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", "model.onnx"}


def test_a_forked_worker_that_outlives_its_parent_keeps_no_lock(bundle):
    process = start(HOLD, bundle.path, "train", "fork")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.kill()
    process.wait()
    try:
        with Bundle.training(bundle.path):
            pass
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        process.communicate()


def test_a_lock_that_is_not_given_back_names_its_owner(bundle, monkeypatch):
    monkeypatch.setattr("edgedetr.bundle.WAIT", 0.2)
    process = start(HOLD, bundle.path, "change", "")
    with pytest.raises(BundleError, match=f"process {process.pid} has been changing this bundle"):
        bundle.update(budget=2.0)
    process.kill()
    process.communicate()
    bundle.update(budget=2.0)
    assert Bundle.open(bundle.path).manifest.budget == 2.0


def test_a_file_system_without_locks_is_said_and_the_work_is_done(bundle, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    put(bundle, "model.onnx", "graph")
    assert "this file system has no locks" in caplog.text
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", "model.onnx"}


def test_a_lock_holds_on_a_full_disk_too(bundle, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with (
        Bundle.training(bundle.path),
        pytest.raises(TrainingError, match="another process"),
        Bundle.training(bundle.path),
    ):
        pass


def test_a_training_that_is_refused_before_it_began_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), Bundle.training(tmp_path / "new.bundle"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


WRITE = """
    import sys, time
    from edgedetr.bundle import Bundle
    with Bundle.open(sys.argv[1]).add(sys.argv[2], stage="test") as path:
        path.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""


def test_what_a_killed_command_left_half_written_is_gone_after_the_next_one(bundle):
    killed = [start(WRITE, bundle.path, name) for name in ("model.onnx", "results/verify.json")]
    for process in killed:
        process.kill()
        process.communicate()
    assert len(list(bundle.path.rglob(".*.tmp"))) == 2
    writing = start(WRITE, bundle.path, "model.fp16.onnx")  # this one lives, and must lose nothing
    with bundle.add("ranges.json", stage="test") as path:
        path.write_text("mine")
        Bundle.open(bundle.path).clean()  # nor this one, of the same process
    left = [path.name for path in bundle.path.rglob(".*.tmp")]
    assert len(left) == 1 and left[0].startswith(".model.fp16.onnx.")
    assert bundle.require("ranges.json").read_text() == "mine"
    writing.kill()
    writing.communicate()


def test_temporary_files_of_other_machines_and_of_older_versions_go_when_they_are_a_day_old(tmp_path):
    kept, gone = {}, {}
    for age, expected in ((3600, kept), (2 * 24 * 3600, gone)):
        for name in (f".model.onnx.0123abcd-{os.getpid()}.x{age}.tmp", f".model.onnx.{age:08}.tmp"):
            path = tmp_path / name
            path.write_text("half")
            os.utime(path, (time.time() - age,) * 2)
            expected[path] = name
    (tmp_path / ".mine.tmp").write_text("a user's own")
    (tmp_path / f".x.{atomic._host()}-1.link.tmp").symlink_to(tmp_path / ".mine.tmp")
    atomic.remove_leftovers(tmp_path)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)
    assert (tmp_path / ".mine.tmp").exists()
