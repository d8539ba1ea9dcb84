"""Fixtures shared by all tests."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))      # `import members`: the family at micro size

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class _Stack(ctypes.Structure):
    """stack_t of <signal.h> on Linux."""

    _fields_ = [("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@pytest.fixture(scope="session", autouse=True)
def _room_for_signals() -> Iterator[None]:
    """A large stack for signal handlers in place of the one of 10 to 20 KB that pytest's faulthandler sets up.

    Python runs every handler on it, also the one for ended children that torch's DataLoader leaves behind. The
    registers of AVX-512 and AMX take up to 11 KB there, twice where the handler's first call is still to be bound: the
    process dies without a word, or writes over its own heap.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    sigaltstack, small = ctypes.CDLL(None).sigaltstack, _Stack()
    memory = mmap.mmap(-1, 1 << 20)
    large = _Stack(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, len(memory))
    assert sigaltstack(ctypes.byref(large), ctypes.byref(small)) == 0
    yield
    assert sigaltstack(ctypes.byref(small), None) == 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets beside the checkout; tests that need them say why they skip where they are missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data sets in {SHARED_DATA}, which are not part of the repository")
    return SHARED_DATA


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def bindings() -> ModuleType:
    """tests/tensorrt_spec/bindings.py, with NVIDIA's bindings at hand; where they are not, a skip with the reason."""
    from tensorrt_spec import bindings

    try:
        bindings.described()
    except bindings.Unavailable as reason:
        pytest.skip(f"needs NVIDIA's TensorRT bindings: {reason}")
    return bindings


@pytest.fixture(scope="session", params=["10.3.0", "10.16.1", "11.4.0"])
def trt(request: pytest.FixtureRequest, bindings: ModuleType) -> ModuleType:
    """The names of one version of TensorRT, as a module to specify fakes with (JetPack 6, JetPack 7.2, TensorRT 11)."""
    return bindings.module(request.param)
