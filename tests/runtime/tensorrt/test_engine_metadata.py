"""The metadata file next to a plan is read back unchanged, and anything else is refused with one message."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import asdict

import pytest

from edgedetr.errors import EngineError
from edgedetr.runtime.tensorrt import engine_metadata
from edgedetr.runtime.tensorrt.engine_layers import LayerSummary
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments, EngineMetadata
from edgedetr.runtime.tensorrt.gpu import Device

ORIN = Device("Orin (nvgpu)", 87, 8 << 30, True, "12.6", "12.6")
ARGUMENTS = BuildArguments("int8", (1, 4, 8), 1024, 3, "auto")
METADATA = EngineMetadata(
    "e.plan",
    "0" * 64,
    7,
    "model.int8.onnx",
    "a" * 64,
    "10.3.0",
    "12.6",
    "12.6",
    "R36.4.3",
    "Orin",
    87,
    "1234",
    ARGUMENTS,
    "strong",
    12.5,
    LayerSummary({"int8": 2}, {"int8": 1}, 3),
    ("a warning",),
)


def test_what_is_written_is_read(tmp_path):
    plan = tmp_path / "e.plan"
    assert engine_metadata.read(plan) is None
    engine_metadata.metadata_path(plan).write_bytes(engine_metadata.to_bytes(METADATA))
    assert engine_metadata.read(plan) == METADATA


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"plan_sha256": "xyz"},
        {"plan_bytes": "7"},
        {"sm": True},
        {"tensorrt": 10.3},
        {"arguments": {}},
        {"arguments": None},
        {"layers": []},
        {"warnings": None},
        {"unknown": 1},
        {"plan": None},
        {"layers": {"precision": [], "weighted": {}, "reformats": 0}},
        {"layers": {"precision": {"int8": "2"}}},
        {"layers": {"reformats": 1e99}},
        {"warnings": [1]},
        {"warnings": 7},
        {"seconds": "1"},
        {"seconds": True},
        {"sm": 10**30},
        {"plan_bytes": -1},
        {"device": "x" * 9999},
        {"host": 5},
        {"driver": None},
        {"arguments": {**asdict(ARGUMENTS), "batch": "148"}},
        {"arguments": {**asdict(ARGUMENTS), "batch": [0, 0, 0]}},
        {"arguments": {**asdict(ARGUMENTS), "batch": [1, 1]}},
        {"arguments": {**asdict(ARGUMENTS), "precision": "int4"}},
        {"arguments": {**asdict(ARGUMENTS), "precision": ["int8"]}},
        {"arguments": {**asdict(ARGUMENTS), "typing": 1}},
    ],
)
def test_metadata_of_another_kind_are_refused(tmp_path, change):
    raw = {**json.loads(engine_metadata.to_bytes(METADATA)), **change}
    (tmp_path / "e.json").write_text(json.dumps(raw))
    with pytest.raises(EngineError, match="e.json: damaged or of another kind.*edgedetr build"):
        engine_metadata.read(tmp_path / "e.plan")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff\xfe", "[" * 100_000, '{"schema": 1}', "1" * (2 << 20)])
def test_anything_else_is_refused(tmp_path, text):
    (tmp_path / "e.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineError, match="of another kind|not readable as JSON|nested too|not UTF|at most"):
        engine_metadata.read(tmp_path / "e.plan")


@pytest.mark.parametrize(
    "harm", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("nowhere", path)]
)
def test_metadata_that_are_no_plain_file_are_one_error_at_once(tmp_path, harm):
    harm(tmp_path / "e.json")
    with pytest.raises(EngineError, match="e.json: (not a plain file|cannot be read)"):
        engine_metadata.read(tmp_path / "e.plan")


def test_metadata_that_cannot_be_opened_are_one_error(tmp_path):
    (tmp_path / "e.json").mkdir()
    with pytest.raises(EngineError, match="cannot be read|not a plain file"):
        engine_metadata.read(tmp_path / "e.plan")


def test_the_name_of_an_engine_says_what_it_is_for():
    name = engine_metadata.engine_name(ARGUMENTS, ORIN, "10.3.0", "1a2b3c4d" + "0" * 56)
    assert re.fullmatch(r"int8-b1\.4\.8-sm87-trt10\.3\.0-cu12\.6-orin-nvgpu-1a2b3c4d-[0-9a-f]{8}", name)
    assert name == engine_metadata.engine_name(ARGUMENTS, ORIN, "10.3.0", "1a2b3c4d" + "0" * 56)


@pytest.mark.parametrize(
    "arguments, device, version",
    [
        (dataclasses.replace(ARGUMENTS, workspace_mb=512), ORIN, "10.3.0"),
        (dataclasses.replace(ARGUMENTS, optimization_level=5), ORIN, "10.3.0"),
        (dataclasses.replace(ARGUMENTS, typing="weak"), ORIN, "10.3.0"),
        (dataclasses.replace(ARGUMENTS, batch=(1, 1, 1)), ORIN, "10.3.0"),
        (dataclasses.replace(ARGUMENTS, precision="fp16"), ORIN, "10.3.0"),
        (ARGUMENTS, dataclasses.replace(ORIN, sm=110), "10.3.0"),
        (ARGUMENTS, dataclasses.replace(ORIN, name="Thor"), "10.3.0"),
        (ARGUMENTS, dataclasses.replace(ORIN, runtime="13.0"), "10.3.0"),
        (ARGUMENTS, ORIN, "10.16.2.10"),
    ],
)
def test_whatever_decides_about_an_engine_is_in_its_name(arguments, device, version):
    assert engine_metadata.engine_name(arguments, device, version, "a" * 64) != engine_metadata.engine_name(
        ARGUMENTS, ORIN, "10.3.0", "a" * 64
    )


def test_a_device_cannot_name_a_file_elsewhere():
    name = engine_metadata.engine_name(
        ARGUMENTS, dataclasses.replace(ORIN, name="../../etc/x\0y" * 20), "10.3.0", "a" * 64
    )
    assert "/" not in name and "\0" not in name and ".." not in name.replace("1.4.8", "") and len(name) < 150
    assert "-gpu-" in engine_metadata.engine_name(ARGUMENTS, dataclasses.replace(ORIN, name="()"), "10.3.0", "a" * 64)
