"""One listing for training, calibration, checking and predicting: hidden files stay out, links are followed once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr.data.listing import files, images_in
from edgedetr.errors import DataError
from edgedetr.runtime.predict import frames


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name, "PNG")


def listed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in images_in(root)]


def test_what_systems_and_tools_leave_behind_is_not_listed(tmp_path):
    put(
        tmp_path,
        "a.png",
        "sub/b.PNG",
        "._a.png",
        ".hidden.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        "__MACOSX/a.png",
        "sub/@eaDir/b.png",
        ".git/x.png",
        "$RECYCLE.BIN/c.png",
    )
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert listed(tmp_path) == ["a.png", "sub/b.PNG"]


def test_a_folder_below_a_hidden_one_is_listed_when_it_is_asked_for(tmp_path):
    put(tmp_path, ".cache/set/a.png")
    assert listed(tmp_path / ".cache" / "set") == ["a.png"]


def test_linked_folders_and_files_are_followed_once_and_loops_end(tmp_path):
    put(tmp_path, "set/z/a.png", "pool/b.png", "pool/deep/c.png")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set" / "z")  # sorted before z: z is listed as itself
    (tmp_path / "set" / "more").symlink_to("../pool")
    (tmp_path / "set" / "twice").symlink_to("../pool")
    (tmp_path / "set" / "up").symlink_to("..")
    (tmp_path / "pool" / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "set" / "one.png").symlink_to("../pool/b.png")
    (tmp_path / "set" / "broken.png").symlink_to("nowhere.png")
    assert listed(tmp_path / "set") == ["more/b.png", "more/deep/c.png", "one.png", "z/a.png"]


def test_pipes_are_not_listed_and_what_is_no_folder_is_one_error(tmp_path):
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "folder.png").mkdir()
    assert listed(tmp_path) == ["a.png"]
    for path in (tmp_path / "none", tmp_path / "a.png", tmp_path / ("n" * 300)):
        with pytest.raises(DataError, match="cannot be read"):
            files(path)


def test_predict_sees_the_files_that_training_sees(tmp_path):
    put(tmp_path, "set/a.jfif", "set/._a.jfif", "set/.ipynb_checkpoints/a.png", "pool/b.png")
    (tmp_path / "set" / "more").symlink_to("../pool")
    seen = [frame.source for frame in frames([tmp_path / "set"])]
    assert seen == images_in(tmp_path / "set")
    assert [Path(path).name for path in seen] == ["a.jfif", "b.png"]
    assert all(isinstance(frame.image, np.ndarray) for frame in frames([tmp_path / "set"]))
