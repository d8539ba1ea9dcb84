"""What needs an NVIDIA GPU; on a machine without one everything here is skipped with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from edgedetr.errors import DeviceError, MissingDependency
from edgedetr.runtime.tensorrt.gpu import Device, probe, tensorrt


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Device:
    try:
        return probe()
    except DeviceError as reason:
        pytest.skip(f"needs an NVIDIA GPU: {reason}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """PyTorch's GPU with products in float32: TF32, which convolutions have by default, keeps 10 bits."""
    if not torch.cuda.is_available():
        pytest.skip("needs a PyTorch that was built for CUDA")
    monkeypatch.delenv("LT_ACCELERATOR")
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT; where it is not installed TensorRT-RTX instead, which has the interface of TensorRT 11."""
    try:
        return tensorrt()
    except MissingDependency as reason:
        rtx = pytest.importorskip("tensorrt_rtx_bindings", reason=f"needs TensorRT or TensorRT-RTX: {reason}")
        monkeypatch.setitem(sys.modules, "tensorrt", rtx)
        return rtx
