"""Lint reads a file and the files next to it, and nothing elsewhere."""

from __future__ import annotations

import pytest
from onnx import TensorProto
from planted import F32, conv_then, one

from edgedetr.errors import ExportError
from edgedetr.lint.lint import lint_file
from edgedetr.lint.lint_targets import TARGETS

ALL = dict.fromkeys(TARGETS, "error")


def with_external_data(folder, location: str = "weights.bin", **entries) -> str:
    model = conv_then()
    tensor = model.graph.initializer[0]
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    stated = {"location": location, "length": str(len(tensor.raw_data)), **entries}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in stated.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_weights_in_a_file_next_to_it_are_read(tmp_path):
    assert lint_file(with_external_data(tmp_path / "a")).findings == ()
    assert lint_file(with_external_data(tmp_path / "b", length=None)).findings == ()


@pytest.mark.parametrize(
    "location, entries, message",
    [
        ("../weights.bin", {}, "outside the folder"),
        ("/etc/hostname", {}, "outside the folder"),
        ("sub/../../weights.bin", {}, "outside the folder"),
        ("none.bin", {}, "not there"),
        ("", {}, "without saying where"),
        ("link.bin", {}, "symbolic link"),
        ("folder/weights.bin", {}, "symbolic link"),
        ("second-name.bin", {}, "hard link"),
        ("pipe", {}, "no plain file"),
        ("large.bin", {}, "at most"),
        ("weights.bin", {"offset": "4000"}, "which has 4096"),
        ("weights.bin", {"offset": "-8"}, "which has 4096"),
        ("weights.bin", {"length": "99999999999"}, "which has 4096"),
    ],
)
def test_weights_elsewhere_are_refused_unread(tmp_path, location, entries, message):
    import os

    folder = tmp_path / "model"
    path = with_external_data(folder, location, **entries)
    (tmp_path / "weights.bin").write_bytes(b"x" * 4096)
    (folder / "link.bin").symlink_to(folder / "weights.bin")
    (folder / "folder").symlink_to(tmp_path)
    (tmp_path / "far.bin").write_bytes(b"x" * 4096)
    os.link(tmp_path / "far.bin", folder / "second-name.bin")
    os.mkfifo(folder / "pipe")
    with open(folder / "large.bin", "wb") as stream:
        stream.truncate(2**31)
    report = lint_file(path)
    first = report.findings[0]
    assert (first.rule, first.severity) == ("external-data", ALL)
    assert message in first.reason
    assert report.errors == 1


def test_a_tensor_that_is_named_often_does_not_fill_the_memory(tmp_path):
    model = conv_then()
    del model.graph.initializer[:]
    with open(tmp_path / "w.bin", "wb") as stream:
        stream.truncate(2**29)
    for number in range(5):
        tensor = model.graph.initializer.add(name=f"t{number}", data_type=F32, dims=[2**27])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "GB of weights" in lint_file(tmp_path / "m.onnx").findings[0].reason


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no graph in it"),
        (b"not onnx at all", "readable|no graph"),
        (one("Relu").SerializeToString()[:-9], "readable|no graph"),
    ],
)
def test_what_is_no_onnx_file_is_an_error(tmp_path, content, message):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        lint_file(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="no such file"):
        lint_file(tmp_path / "none.onnx")
