"""Every fault of the system is one message with the path, and a signal ends a command cleanly, with its own code."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap

import click
import pytest

from edgedetr import cli, packages
from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import EdgedetrError
from edgedetr.storage.atomic import atomic_write


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle.create(
        tmp_path / "b.bundle",
        Manifest("rt_detr", (ClassInfo(0, 1, "größer"),), InputContract(32, 32), OutputContract()),
    )


def fails_with(error: BaseException, monkeypatch) -> int:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setitem(cli.cli.commands, "fails", fails)
    return cli.run(["fails"])


def system(number: int, path: str | None = "/data/cells.bundle/model.onnx") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    "error, words",
    [
        (system(errno.ENOSPC), ["/data/cells.bundle/model.onnx: the disk is full (", "bytes are free"]),
        (system(errno.EDQUOT), ["/data/cells.bundle/model.onnx: the disk is full"]),
        (system(errno.EROFS), ["model.onnx: Read-only file system; expected a path that this user may read and write"]),
        (system(errno.EACCES), ["model.onnx: Permission denied"]),
        (system(errno.EIO), ["/data/cells.bundle/model.onnx: Input/output error"]),
        (system(errno.ENAMETOOLONG, "a" * 300), ["aaa", "File name too long; expected names of at most 255 bytes"]),
        (system(errno.ENOTDIR), ["model.onnx: Not a directory"]),
        (system(errno.EFBIG), ["model.onnx: File too large", "ulimit -f"]),
        (system(errno.EIO, None), ["a file: Input/output error"]),
        (system(errno.ENOMEM), ["not enough memory", "MiB are available"]),
        (MemoryError(), ["not enough memory", "close other programs"]),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            ["not enough memory"],
        ),
        (
            ImportError("libx.so: failed to map segment from shared object", name="onnx"),
            ["not enough memory to load onnx"],
        ),
        (
            ImportError("libx.so.1: cannot open shared object file", name="cv2"),
            ["opencv-python-headless is installed but cannot be loaded"],
        ),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), ["opencv-python-headless is not installed"]),
        (RecursionError("maximum recursion depth exceeded"), ["nested too deep"]),
        (UnicodeEncodeError("ascii", "ö", 0, 1, "ordinal not in range(128)"), ["expected UTF-8: set LC_ALL=C.UTF-8"]),
        (EOFError("end of archive"), ["a file ends before it should (end of archive)"]),
    ],
)
def test_a_fault_of_the_system_is_one_message(error, words, monkeypatch, capsys):
    assert fails_with(error, monkeypatch) == 1
    output = capsys.readouterr().err.strip()
    assert "Traceback" not in output
    assert len(output.splitlines()) == 1 and output.startswith("edgedetr: ")
    assert all(one in output for one in words), output


def test_a_mistake_in_the_code_stays_a_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        fails_with(ZeroDivisionError(), monkeypatch)


def test_debug_shows_where_the_system_refused(monkeypatch):
    @click.command()
    def fails() -> None:
        raise system(errno.EIO)

    monkeypatch.setitem(cli.cli.commands, "fails", fails)
    with pytest.raises(OSError, match="Input/output error"):
        cli.run(["--debug", "fails"])


def test_a_package_that_is_there_is_never_called_missing():
    assert "not installed" in packages.missing("cv2", ModuleNotFoundError("No module named 'cv2'"))
    assert "not installed" not in packages.missing("cv2", ImportError("libGL.so.1: cannot open shared object file"))


def test_a_write_that_fails_names_the_file_and_keeps_the_old_one(bundle):
    with bundle.add("model.onnx", stage="test") as path:
        path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught, bundle.add("model.onnx", stage="test") as path:
            path.write_bytes(bytes(1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(bundle.path / "model.onnx") and caught.value.written == 1 << 16
    assert bundle.require("model.onnx").read_bytes() == b"old"
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", "model.onnx"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space" }'),
    ],
)
def test_a_full_disk_is_recognized_whatever_library_writes(tmp_path, error):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "weights.safetensors") as path:
        path.write_bytes(b"12345")
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "weights.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_a_line_appended_to_the_record_of_a_training_names_its_file(tmp_path):
    record = pytest.importorskip("edgedetr.training.output", exc_type=ImportError).MetricsLog(tmp_path, 0)
    record._board = None
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        record.write("train", 1, {"loss": 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_full_standard_output_is_one_message(bundle):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgedetr", "inspect", str(bundle.path), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "edgedetr: standard output: No space left on device"
    assert "Traceback" not in done.stderr


def test_output_that_cannot_show_a_letter_escapes_it(bundle):
    done = subprocess.run(
        [sys.executable, "-m", "edgedetr", "inspect", str(bundle.path), "--json"],
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and '"gr\\u00f6\\u00dfer"' in done.stdout


def test_a_name_that_is_no_utf8_is_refused_before_anything_is_done(capsys):
    assert cli.run(["train", "--data", os.fsdecode(b"/data/caf\xe9")]) == 1
    assert "/data/caf\\udce9: the name is not valid UTF-8" in capsys.readouterr().err


WRITING = """
    import signal, sys, time
    import click
    from edgedetr import cli
    from edgedetr.bundle import Bundle

    @click.command()
    def write():
        with Bundle.open(sys.argv[1]).add("results/model.onnx", stage="test") as path, Bundle.training(sys.argv[1]):
            path.write_text("half")
            print("ready", flush=True)
            time.sleep(60)

    cli.cli.commands["write"] = write
    if sys.argv[2] == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    cli.main(["write"])
"""


def in_the_foreground() -> None:
    """What runs in the background, or under nohup, ignores these, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_cleanly_and_with_its_own_code(bundle, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITING), str(bundle.path), ""],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=in_the_foreground,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, output = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert "stopped; finished files are on disk" in output and "Traceback" not in output
    assert {path.name for path in bundle.path.rglob("*") if path.is_file()} == {"bundle.json"}


def test_nohup_stays_nohup(bundle):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITING), str(bundle.path), "nohup"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.terminate()
    assert process.wait(30) == 143


def test_handlers_are_as_before_after_a_command(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert fails_with(EdgedetrError("no"), monkeypatch) == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
