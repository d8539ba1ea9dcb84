"""Files of others are read within limits, and each way to fail is one error with the path."""

from __future__ import annotations

import json
import os

import pytest

from edgedetr.errors import DataError
from edgedetr.storage.reading import read_bytes, read_json, read_text, read_toml


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_or_without_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Größe 木\n".encode(encoding))
    assert read_text(tmp_path / "a.txt", DataError) == "Größe 木\n"


@pytest.mark.parametrize("raw", ["Größe".encode("latin-1"), "木材".encode("gbk"), b"\xff\xfea"])
def test_text_of_another_encoding_is_one_error_that_says_what_to_do(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.txt: not UTF-(8|16) text .*save it as UTF-8"):
        read_text(tmp_path / "a.txt", DataError)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_with_zero_bytes_is_not_taken_for_utf_8(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("cat\r\n".encode(encoding))
    with pytest.raises(DataError, match=r"a\.txt: contains zero bytes.*save it as UTF-8"):
        read_text(tmp_path / "a.txt", DataError)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("1" * 5000, "not readable as JSON"),
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
    ],
)
def test_json_that_python_refuses_in_its_own_ways_is_one_error(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"a\\.json: {said}.*; run: fix it"):
        read_json(tmp_path / "a.json", DataError, fix="run: fix it")


@pytest.mark.parametrize(
    "text, said",
    [("a = " + "[" * 50_000, "nested too deep"), ("a = " + "1" * 5000, "not readable as TOML"), ("a", "not readable")],
)
def test_toml_that_python_refuses_in_its_own_ways_is_one_error(tmp_path, text, said):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(DataError, match=f"a\\.toml: {said}"):
        read_toml(tmp_path / "a.toml", DataError)


def test_what_json_and_toml_say_comes_back(tmp_path):
    value = {"a": [1, 2.5, "x"], "b": {"c": True}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    (tmp_path / "a.toml").write_text('a = [1, 2.5, "x"]\n[b]\nc = true\n')
    assert read_json(tmp_path / "a.json", DataError) == value == read_toml(tmp_path / "a.toml", DataError)


def test_pipes_folders_missing_and_large_files_are_errors_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for name, said in (
        ("pipe", "not a plain file"),
        (".", "not a plain file"),
        ("none", "No such file"),
        ("large", "expected at most"),
        ("a\0b", "cannot be read"),
        ("n" * 300, "File name too long"),
    ):
        with pytest.raises(DataError, match=said):
            read_bytes(tmp_path / name, DataError, limit=10)


def test_a_message_that_quotes_a_whole_file_keeps_its_ends_alone():
    error = DataError("start " + "x" * 1_000_000 + " end")
    assert len(str(error)) < 11_000
    assert str(error).startswith("start xxx") and str(error).endswith("xxx end") and "characters]" in str(error)
    assert str(DataError("short")) == "short"
