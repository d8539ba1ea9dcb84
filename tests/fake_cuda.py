"""A CUDA without a GPU: fake_cuda.c, compiled once per session and put where edgedetr.runtime.tensorrt.cudart looks."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedetr.runtime.tensorrt import gpu

LIVE = ("device", "host", "streams", "graphs")
WORK = ctypes.CFUNCTYPE(None)


class FakeCuda:
    """The fake's controls.

    log        names of the functions called so far, in order
    """

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_enqueue.argtypes = [ctypes.c_void_p, WORK]
        self.library.fake_capturing.argtypes = [ctypes.c_void_p]
        self.library.fake_reset()
        self.kept: list[object] = []  # what C holds a pointer to must not be collected

    @property
    def log(self) -> list[str]:
        return self.library.fake_log().decode().split()

    def fail(self, name: str, code: int, after: int = 0) -> None:
        """Let `name` give this code once it has worked `after` times."""
        self.library.fake_fail(name.encode(), code, after)

    def device(self, *, count: int = 1, integrated: bool = False, cuda: int = 12060) -> None:
        self.library.fake_device(count, int(integrated), cuda)

    def live(self) -> dict[str, int]:
        """What is allocated and has not been given back."""
        return {kind: self.library.fake_live(index) for index, kind in enumerate(LIVE)}

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Queue Python work on a stream, as a kernel would be: done when somebody waits, or recorded."""
        self.kept.append(WORK(work))
        self.library.fake_enqueue(stream, self.kept[-1])

    def capturing(self, stream: int) -> bool:
        return bool(self.library.fake_capturing(stream))


@functools.cache
def built(version: int) -> Path:
    """The library, as CUDA `version` (12060 is 12.6)."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler for the fake CUDA")
    path = Path(tempfile.mkdtemp(prefix="fake-cuda-")) / f"libfakecuda{version}.so"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-w",
            f"-DFAKE_VERSION={version}",
            "-o",
            str(path),
            str(Path(__file__).with_name("fake_cuda.c")),
        ],
        check=True,
        timeout=60,
    )
    return path


def install(monkeypatch: pytest.MonkeyPatch, version: int = 12060) -> FakeCuda:
    """Let edgedetr find the fake as the driver and as the libcudart of its major version."""
    fake = FakeCuda(built(version))
    monkeypatch.setattr(gpu, "DRIVER", str(fake.path))
    monkeypatch.setattr(gpu, "RUNTIMES", {version // 1000: str(fake.path)})
    gpu.load_cudart.cache_clear()
    monkeypatch.setattr(gpu, "load_cudart", gpu.load_cudart.__wrapped__)
    return fake


def at(address: int, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """A view of an array in the fake's memory."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address), dtype).reshape(shape)
