"""`edgedetr build`: its words reach the builder, and what came of it reaches the reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from engine_build import command


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
    arguments = json.loads(out)[0]["arguments"]
    assert code == 0 and arguments == {
        "precision": "fp32",
        "batch": [1, 4, 8],
        "workspace_mb": 200,
        "optimization_level": 1,
        "typing": "strong",
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["--batch", "2", "--dynamic", "1,2,4"], "exclude each other"),
        (["--dynamic", "1,2"], "expected three numbers"),
        (["--dynamic", "4,2,1"], "ascending"),
        (["--batch", "0"], "0 is not in the range"),
        (["--precision", "int4"], "int4"),
        (["--frame", "1080p"], "for example 1080x1920"),
        (["--workspace", "1"], "expected from 64 to the 8192 MB of Orin"),
    ],
)
def test_wrong_words_exit_2(old, bundle, capsys, words, said):
    code, out, err = command(capsys, str(bundle.path), *words)
    assert code == 2 and said in err and out == "" and not old.flags


def test_build_without_tensorrt_is_one_error_that_says_where_to_run_it(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, out, err = command(capsys, str(bundle.path))
    assert code == 1 and out == "" and "TensorRT is not installed here" in err and "Traceback" not in err
    assert f"copy {bundle.path} there and run: edgedetr build {bundle.path}" in err


def test_warnings_of_known_defects_reach_the_reader(old, bundle, capsys, monkeypatch):
    from edgedetr.runtime.tensorrt import known_issues

    entry = known_issues.KnownIssue("x", (("10.3", "10.4"),), "it is slow", "wait", "https://example.org")
    monkeypatch.setattr(known_issues, "all_issues", lambda: (entry,))
    assert "it is slow; wait (https://example.org)" in command(capsys, str(bundle.path), "--precision", "int8")[2]
