"""Unusual environments: spaces and letters in paths, a locale without UTF-8, a clock that jumps, no free inodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgedetr import cli
from edgedetr.bundle import Bundle

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder whose name has spaces, quotes, brackets and letters that ASCII lacks, with a bundle and its data."""
    folder = tmp_path / "my cells (2)" / "Größe 木 'x' [1]"
    shutil.copytree(FIXTURES / "bundle-0.1", folder / "a b.bundle")
    shutil.copytree(FIXTURES / "scenes-0.1", folder / "da ta")
    return folder


@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.slow)])
def test_paths_with_spaces_and_letters_work_in_any_locale(folder, locale):
    code = """
        import sys
        from edgedetr import cli
        folder = sys.argv[1]
        bundle, data = folder + "/a b.bundle", folder + "/da ta"
        codes = [cli.run(["predict", bundle, data + "/images/test", "--conf", "0", "--out", folder + "/dra wn"]),
                 cli.run(["inspect", bundle]), cli.run(["data", "check", data]),
                 cli.run(["verify", bundle, "--data", data, "--backend", "onnxruntime"]), cli.run(["report", bundle])]
        print(codes, file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": locale},
    )
    assert done.stderr.decode("utf-8", "replace").splitlines()[-1] == "[0, 0, 0, 3, 0]", done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.decode("utf-8", "replace").splitlines() if line.startswith("{")]
    assert len(lines) == 8 == len(list((folder / "dra wn").iterdir()))


def test_where_names_cannot_be_read_the_message_says_how_to_read_them(folder):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "edgedetr", "inspect", str(folder / "a b.bundle")],
        capture_output=True,
        check=False,
        env=environment,
        text=True,
    )
    assert done.returncode == 1
    assert "names are read as ascii: set PYTHONUTF8=1" in done.stderr and "Traceback" not in done.stderr


def test_a_path_of_300_characters_works_and_a_name_of_300_is_one_error(tmp_path, capsys):
    deep = tmp_path.joinpath(*["d" * 100] * 3)
    shutil.copytree(FIXTURES / "bundle-0.1", deep / "a.bundle")
    assert cli.run(["inspect", str(deep / "a.bundle")]) == 0
    capsys.readouterr()
    assert cli.run(["inspect", str(tmp_path / ("n" * 300))]) in (1, 2)
    said = capsys.readouterr().err
    assert "n" * 300 in said.replace("\n", "") and "Traceback" not in said


def test_a_clock_that_jumps_back_and_far_ahead_changes_nothing(folder, monkeypatch, capsys):
    import time

    bundle = folder / "a b.bundle"
    image = sorted((folder / "da ta" / "images" / "test").iterdir())[0]
    assert cli.run(["predict", str(bundle), str(image), "--conf", "0"]) == 0
    before = json.loads(capsys.readouterr().out)["detections"]
    times = iter([4e9, 1.0, 5e9, -1.0, 1.7e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(times))
    for path in bundle.iterdir():
        os.utime(path, (4e9, 4e9))  # a file of the future
    assert cli.run(["predict", str(bundle), str(image), "--conf", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["detections"] == before
    with Bundle.open(bundle).add("results/note.json", stage="test") as path:
        path.write_text("{}")
    assert Bundle.open(bundle).require("results/note.json").read_text() == "{}"


@pytest.mark.parametrize("form", ["zip", "gztar"])
def test_an_archive_is_named_and_nothing_is_unpacked(form, tmp_path, capsys):
    packed = shutil.make_archive(str(tmp_path / "cells.bundle"), form, FIXTURES / "scenes-0.1")
    before = sorted(tmp_path.rglob("*"))
    for words in (["inspect", packed], ["verify", packed], ["predict", packed, "x.jpg"], ["data", "check", packed]):
        assert cli.run(words) in (1, 2)
        said = capsys.readouterr().err
        assert "archive" in said and "unpack" in said and "Traceback" not in said, words
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to mount a small file system")
def test_without_a_free_inode_the_bundle_stays_as_it_was_and_the_error_names_the_file(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m,nr_inodes=40", "tmpfs", str(disk)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        shutil.copytree(FIXTURES / "bundle-0.1", disk / "b", ignore=shutil.ignore_patterns("train"))
        before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        filler = 0
        try:
            while True:
                (disk / f"filler{filler}").touch()
                filler += 1
        except OSError:
            pass
        assert cli.run(["report", str(disk / "b")]) == 1
        said = capsys.readouterr().err.replace("\n", " ")
        assert f"{disk / 'b' / 'report'}" in said and "the disk is full" in said and "Traceback" not in said
        assert {path: path.read_bytes() for path in before} == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
