"""NVIDIA's own libcudart of CUDA 11, 12 and 13, and their headers: names, arguments, numbers, and what they say here.

The wheels (4 MB together) are fetched at test time and never committed. Without a driver the libraries load, say their
version and refuse everything else, which is enough to see that calls arrive and errors come back.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import fake_cuda
import pytest
from tensorrt_spec import bindings as wheels

from edgedetr.errors import DeviceError
from edgedetr.runtime.tensorrt import cudart, gpu
from edgedetr.runtime.tensorrt.cudart import Cuda
from edgedetr.runtime.tensorrt.gpu import Device

WHEELS = {
    "11.8": "nvidia-cuda-runtime-cu11==11.8.89",
    "12.6": "nvidia-cuda-runtime-cu12==12.6.77",
    "13.0": "nvidia-cuda-runtime==13.0.96",
}
NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
DRIVER = Path("/proc/driver/nvidia/version")
NUMBERS = {  # in driver_types.h and cuda.h -> here
    "cudaErrorMemoryAllocation": cudart.OUT_OF_MEMORY,
    "cudaErrorStreamCaptureUnsupported": cudart.CAPTURE_ERRORS[0],
    "cudaErrorStreamCaptureWrongThread": cudart.CAPTURE_ERRORS[-1],
    "cudaMemcpyDefault": cudart.COPY_DEFAULT,
    "cudaStreamNonBlocking": cudart.NON_BLOCKING,
    "cudaHostAllocMapped": cudart.HOST_ALLOC_MAPPED,
    "cudaStreamCaptureModeThreadLocal": cudart.CAPTURE_THREAD_LOCAL,
    "CU_DEVICE_ATTRIBUTE_INTEGRATED": gpu.INTEGRATED,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": gpu.MAJOR,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": gpu.MINOR,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    try:
        return wheels.fetch(WHEELS, tmp_path_factory.mktemp("cudart"))
    except wheels.Unavailable as reason:
        pytest.skip(f"needs NVIDIA's libcudart: {reason}")


@pytest.fixture(params=list(WHEELS))
def version(request):
    return request.param


@pytest.fixture
def header(folders, version):
    """The C declarations without comments."""
    paths = [
        path
        for name in ("cuda_runtime_api.h", "driver_types.h", "cuda.h")
        for path in sorted(Path(folders[version]).glob(f"nvidia/*/include/{name}"))
    ]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return re.sub(r"/\*.*?\*/", "", "\n".join(texts), flags=re.S)


@pytest.fixture
def real(monkeypatch, folders, version):
    """The real libcudart, found where the wheel puts it, under a fake driver of the same version."""
    fake = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(gpu, "RUNTIMES", {int(re.search(r"so\.(\d+)", name)[1]): name for name in NAMES})
    monkeypatch.setattr(sys, "path", [str(folders[version])])
    monkeypatch.setattr(gpu.site, "getsitepackages", list)
    major, minor = version.split(".")
    fake.device(cuda=1000 * int(major) + 10 * int(minor))


def test_it_is_found_in_the_wheel_and_says_its_version(real, version):
    if version == "11.8" and not DRIVER.exists():  # CUDA 11 asks the driver even for this
        with pytest.raises(DeviceError, match="cudaRuntimeGetVersion returned 35"):
            gpu.probe()
    else:
        assert gpu.probe().runtime == version


def test_every_function_is_there_and_errors_come_back_in_words(real, version):
    if DRIVER.exists():
        pytest.skip("needs a machine without an NVIDIA driver: here the calls succeed")
    cuda = Cuda(Device("none", 87, 0, False, version, version))
    for act in (cuda.stream, lambda: cuda.allocate(16), lambda: cuda.allocate_host(16), cuda.free_bytes):
        # 35: no driver for this version; 100: no device; which of them depends on the machine of the test
        with pytest.raises(
            DeviceError,
            match=r"cuda\w+ returned cudaError(InsufficientDriver .35.|NoDevice .100.): \w+.*; "
            r"run: edgedetr doctor",
        ):
            act()


def test_numbers_are_those_of_the_headers(header):
    for name, number in NUMBERS.items():
        found = re.search(rf"\b{name}\s*=?\s*(0x)?(\d+)", header)
        assert found and int(found[2], 16 if found[1] else 10) == number, name


def test_arguments_are_those_of_the_headers(header, version):
    documented = {
        **cudart.SIGNATURES,
        "cudaGraphInstantiate": cudart.INSTANTIATE_11 if version < "12" else cudart.INSTANTIATE_12,
    }
    for name, arguments in documented.items():
        found = re.search(rf"CUDARTAPI\s+{name}\(([^;]*?)\)\s*;", header, re.S)
        assert found, name
        words = [word.strip() for word in re.sub(r"__dv\(\w+\)", "", found[1]).split(",")]
        words = [] if words == ["void"] else words
        assert [_kind(word) for word in words] == [_ctype(argument) for argument in arguments], (name, words)


def _kind(word: str) -> str:
    """What a C parameter is to the calling convention: a pointer or handle, or a whole number of 4 or 8 bytes."""
    if "*" in word or re.match(r"cuda(Stream|Event|Graph|GraphExec|GraphNode)_t\b", word):
        return "pointer"
    if "unsigned long long" in word or "size_t" in word:
        return "8 bytes"
    assert re.match(r"(unsigned int|int|cudaError_t|enum cuda\w+)\b", word), word
    return "4 bytes"


def _ctype(argument: object) -> str:
    if argument in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(argument, "contents"):
        return "pointer"
    return f"{ctypes.sizeof(argument)} bytes"
