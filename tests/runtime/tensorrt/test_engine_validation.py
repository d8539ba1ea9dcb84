"""Nothing is deserialized that is not complete, of this machine, and built for this device and this TensorRT."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedetr.errors import EngineError
from edgedetr.runtime import jetson
from edgedetr.runtime.tensorrt import engine_metadata, engine_validation
from edgedetr.runtime.tensorrt.engine_layers import LayerSummary
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments, EngineMetadata
from edgedetr.runtime.tensorrt.gpu import Device

ORIN = Device("Orin", 87, 8 << 30, True, "12.6", "12.6")
DATA = b"ftrt" + bytes(range(256)) * 4
ARGUMENTS = BuildArguments("int8", (1, 1, 1), 1024, 3, "auto")


def metadata_of(plan: Path, data: bytes = DATA, **changes: object) -> EngineMetadata:
    made = EngineMetadata(
        plan=plan.name,
        plan_sha256=hashlib.sha256(data).hexdigest(),
        plan_bytes=len(data),
        onnx="model.int8.onnx",
        onnx_sha256="a" * 64,
        tensorrt="10.3.0",
        cuda="12.6",
        driver="12.6",
        jetpack="R36.4.3",
        device="Orin",
        sm=87,
        host=engine_validation.host(),
        arguments=ARGUMENTS,
        typing="strong",
        seconds=1.0,
        layers=LayerSummary({"int8": 2}, {"int8": 1}, 3),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(DATA)
    engine_metadata.metadata_path(path).write_bytes(engine_metadata.to_bytes(metadata_of(path)))
    return path


def rewrite(plan: Path, **changes: object) -> None:
    engine_metadata.metadata_path(plan).write_bytes(engine_metadata.to_bytes(metadata_of(plan, **changes)))


def test_an_engine_of_this_environment_is_read(plan):
    found = engine_validation.check(plan, ORIN, "10.3.0", onnx_sha256="a" * 64)
    assert found.data == DATA and found.metadata == metadata_of(plan)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tensorrt": "10.16.2.10"}, ["built for TensorRT 10.16.2.10", "needed here: TensorRT 10.3.0"]),
        ({"sm": 110}, ["compute capability sm_110", "compute capability sm_87"]),
        ({"device": "Orin Nano"}, ["device Orin Nano", "device Orin;"]),
        ({"cuda": "13.0"}, ["CUDA 13.0", "CUDA 12.6"]),
        ({"onnx_sha256": "b" * 64}, ["model.int8.onnx sha256 bbbbbbbb", "sha256 aaaaaaaa"]),
        ({"tensorrt": "11.4.1", "sm": 110, "device": "Thor"}, ["TensorRT 11.4.1", "sm_110", "device Thor"]),
    ],
)
def test_a_mismatch_says_what_was_found_what_is_needed_and_the_command(plan, changes, words):
    rewrite(plan, **changes)
    with pytest.raises(EngineError) as caught:
        engine_validation.check(plan, ORIN, "10.3.0", onnx_sha256="a" * 64, trust=True)  # trust does not make it fit
    for word in [*words, str(plan), "edgedetr build"]:
        assert word in str(caught.value)


def test_a_plan_without_metadata_is_refused_unless_trusted(plan):
    engine_metadata.metadata_path(plan).unlink()
    with pytest.raises(EngineError, match="a plan is executable code; build it here.*trust=True"):
        engine_validation.check(plan, ORIN, "10.3.0")
    assert engine_validation.check(plan, ORIN, "10.3.0", trust=True) == engine_validation.ValidatedEngine(DATA, None)


def test_a_plan_of_another_machine_is_refused_although_all_else_fits(plan, tmp_path, monkeypatch):
    identity = tmp_path / "machine-id"
    identity.write_text("fedcba9876543210fedcba9876543210\n")
    monkeypatch.setattr(engine_validation, "MACHINE_ID", identity)
    theirs = engine_metadata.read(plan).host
    assert engine_validation.host() not in ("", theirs)
    with pytest.raises(EngineError, match="built on another machine; a plan is executable code") as caught:
        engine_validation.check(plan, ORIN, "10.3.0")
    # Whoever reads the refusal in a bug report could write an engine that passes for one of this machine.
    assert engine_validation.host() not in str(caught.value) and theirs not in str(caught.value)
    assert engine_validation.check(plan, ORIN, "10.3.0", trust=True).data == DATA


def test_a_plan_that_names_no_machine_is_refused(plan):
    rewrite(plan, host="")
    with pytest.raises(EngineError, match="does not name the machine that built it.*--allow-foreign-engine accepts it"):
        engine_validation.check(plan, ORIN, "10.3.0")
    assert engine_validation.check(plan, ORIN, "10.3.0", trust=True).data == DATA


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", "0" * 32, "short", "x" * 32, "\xff"])
@pytest.mark.parametrize("host", ["", "0123456789abcdef"])
def test_on_a_machine_without_an_id_every_plan_is_refused(plan, tmp_path, monkeypatch, cache, content, host):
    monkeypatch.setattr(engine_validation, "MACHINE_ID", tmp_path / "id")
    if content is not None:
        (tmp_path / "id").write_text(content, encoding="latin-1")
    rewrite(plan, host=host)
    with pytest.raises(EngineError, match="a plan is executable code"):
        engine_validation.check(plan, ORIN, "10.3.0")
    assert not cache.exists()  # looking makes no id


def test_who_builds_without_an_id_gets_one_of_the_user_that_loads_again(plan, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(engine_validation, "MACHINE_ID", tmp_path / "none")
    assert engine_validation.host() == ""
    made = engine_validation.host(make=True)
    rewrite(plan, host=made)
    assert made and engine_validation.check(plan, ORIN, "10.3.0").data == DATA
    own = cache / engine_validation.OWN_ID
    assert own.stat().st_mode & 0o777 == 0o600 and engine_validation.host(make=True) == made
    text = own.read_text()
    own.chmod(0o666)  # anybody may have put it there
    assert engine_validation.host() == ""
    own.unlink()
    (tmp_path / "elsewhere").write_text(text)
    own.symlink_to(tmp_path / "elsewhere")
    assert engine_validation.host() == ""


@pytest.mark.parametrize(
    "changes, release, words",
    [
        ({"driver": "12.4"}, "", "driver 12.4, which is now 12.6"),
        ({}, "R36.4.4", "Jetson Linux R36.4.3, which is now R36.4.4"),
        ({}, "R36.4.3", ""),
        ({}, "", ""),
        ({"driver": "", "jetpack": ""}, "R36.4.3", ""),
    ],
)
def test_a_change_of_driver_or_release_is_said_and_no_reason_to_refuse(plan, monkeypatch, changes, release, words):
    monkeypatch.setattr(jetson, "linux_release", lambda: release)
    rewrite(plan, **changes)
    found = engine_validation.check(plan, ORIN, "10.3.0").metadata
    assert words in engine_validation.drift(found, ORIN) and bool(words) == bool(engine_validation.drift(found, ORIN))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (DATA[:-1], "damaged or replaced"),
        (DATA + b"x", "damaged"),
        (b"x" + DATA[1:], "damaged or replaced"),
    ],
)
def test_a_cut_longer_empty_or_changed_plan_is_refused(plan, data, words):
    plan.write_bytes(data)
    with pytest.raises(EngineError, match=f"{words}.*edgedetr build"):
        engine_validation.check(plan, ORIN, "10.3.0")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 8 * len(DATA) - 1))
def test_every_flipped_bit_of_a_plan_is_noticed(plan, bit):
    changed = bytearray(DATA)
    changed[bit // 8] ^= 1 << bit % 8
    plan.write_bytes(bytes(changed))
    with pytest.raises(EngineError, match="damaged or replaced"):
        engine_validation.check(plan, ORIN, "10.3.0")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 900), flip=st.integers(0, 7000))
def test_damaged_metadata_are_one_error_or_still_describe_the_plan(plan, cut, flip):
    good = engine_metadata.to_bytes(metadata_of(plan))
    harmed = bytearray(good[: len(good) - cut])
    if harmed:
        harmed[flip // 8 % len(harmed)] ^= 1 << flip % 8
    engine_metadata.metadata_path(plan).write_bytes(bytes(harmed))
    try:
        found = engine_validation.check(plan, ORIN, "10.3.0")
    except EngineError:
        return
    assert found.data == DATA and found.metadata.plan_sha256 == hashlib.sha256(DATA).hexdigest()
    assert (found.metadata.tensorrt, found.metadata.sm, found.metadata.device) == ("10.3.0", 87, "Orin")


@pytest.mark.parametrize(
    "name, harm, words",
    [
        ("symbolic link", lambda plan, other: plan.symlink_to(other), "symbolic link"),
        ("hard link", lambda plan, other: os.link(other, plan), "2 names"),
        ("folder", lambda plan, other: plan.mkdir(), "not a plain file"),
        ("pipe", lambda plan, other: os.mkfifo(plan), "not a plain file"),
        ("missing", lambda plan, other: None, "no such file"),
    ],
)
def test_only_a_plain_file_of_its_own_is_read(plan, tmp_path, name, harm, words):
    other = tmp_path / "other"
    plan.rename(other)
    harm(plan, other)
    with pytest.raises(EngineError, match=words):
        engine_validation.check(plan, ORIN, "10.3.0")


def test_a_plan_that_everyone_may_write_is_refused(plan):
    plan.chmod(0o666)
    with pytest.raises(EngineError, match=f"everyone may write to it; run: chmod o-w {plan}"):
        engine_validation.check(plan, ORIN, "10.3.0")


def test_an_oversized_plan_is_not_read(plan, monkeypatch):
    monkeypatch.setattr(engine_validation, "LARGEST", 100)
    with pytest.raises(EngineError, match="more than the 100"):
        engine_validation.check(plan, ORIN, "10.3.0")
