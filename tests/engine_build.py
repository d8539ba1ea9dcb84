"""A device that TensorRT is installed on: the fake of one version, and the command that builds."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from tensorrt_spec.fake import FakeTensorRT

from edgedetr.runtime.tensorrt import gpu
from edgedetr.runtime.tensorrt.gpu import Device

ORIN = Device("Orin", 87, 8 << 30, True, "12.6", "12.6")


def install(spec: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    made = FakeTensorRT(spec)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    monkeypatch.setattr(gpu, "probe", lambda: ORIN)
    return made


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from edgedetr.cli import run

    code = run(["build", *words])
    said = capsys.readouterr()
    return code, said.out, said.err
