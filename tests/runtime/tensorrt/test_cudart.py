"""ctypes on a CUDA that is compiled for the test: real calls, real return codes, no GPU."""

from __future__ import annotations

import sys

import fake_cuda
import numpy as np
import pytest

from edgedetr.errors import DeviceError
from edgedetr.runtime.tensorrt import cudart, gpu
from edgedetr.runtime.tensorrt.cudart import CaptureError, Cuda
from edgedetr.runtime.tensorrt.gpu import Device


@pytest.fixture(params=[11080, 12060, 13020], ids=["cuda11", "cuda12", "cuda13"])
def fake(request, monkeypatch):
    return fake_cuda.install(monkeypatch, request.param)


@pytest.fixture
def fake12(monkeypatch):
    return fake_cuda.install(monkeypatch)


def nothing_left(fake) -> bool:
    return not any(fake.live().values())


def test_the_device_is_read_from_the_driver_and_the_version_from_libcudart(fake):
    fake.device(integrated=True, cuda=13020)
    version = {"11": "11.8", "12": "12.6", "13": "13.2"}[fake.path.stem.removeprefix("libfakecuda")[:2]]
    assert gpu.probe() == Device("Orin", 87, 8 << 30, True, "13.2", version)
    assert "cudaMalloc" not in fake.log


def test_probing_makes_no_context(fake12):
    gpu.probe()
    assert [name for name in fake12.log if name.startswith("cuda")] == ["cudaRuntimeGetVersion"]


def test_without_a_driver_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "DRIVER", "libcuda-that-is-not-there.so.1")
    with pytest.raises(DeviceError, match="no NVIDIA driver: libcuda-that-is-not-there.so.1 .*edgedetr doctor"):
        gpu.probe()


def test_a_driver_that_does_not_work_is_quoted(fake12):
    fake12.fail("cuInit", 803)
    with pytest.raises(DeviceError, match="cuInit returned 803 .system has unsupported display driver"):
        gpu.probe()


def test_a_driver_without_a_device_says_so(fake12):
    fake12.device(count=0)
    with pytest.raises(DeviceError, match="sees no device.*CUDA_VISIBLE_DEVICES"):
        gpu.probe()


def test_without_libcudart_the_package_is_named(fake12, monkeypatch):
    monkeypatch.setattr(gpu, "RUNTIMES", {13: "libcudart-none.so.13", 12: "libcudart-none.so.12"})
    with pytest.raises(DeviceError, match=r"no libcudart .*CUDA 12.*libcudart-none.so.12; .*runtime-cu12"):
        gpu.probe()


def test_a_libcudart_newer_than_the_driver_is_not_taken(fake12, monkeypatch):
    monkeypatch.setattr(gpu, "RUNTIMES", {13: str(fake_cuda.built(13020)), 12: str(fake12.path)})
    fake12.device(cuda=12060)
    assert gpu.probe().runtime == "12.6"


def test_a_libcudart_of_a_wheel_is_found(fake12, monkeypatch, tmp_path):
    inside = tmp_path / "nvidia" / "cuda_runtime" / "lib"
    inside.mkdir(parents=True)
    (inside / "libcudart-wheel.so.12").write_bytes(fake12.path.read_bytes())
    monkeypatch.setattr(gpu, "RUNTIMES", {12: "libcudart-wheel.so.12"})
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert gpu.probe().runtime == "12.6"


def test_a_damaged_libcudart_is_as_good_as_none(fake12, monkeypatch, tmp_path):
    (tmp_path / "libcudart.so.12").write_bytes(b"\x7fELF and nothing")
    monkeypatch.setattr(gpu, "RUNTIMES", {12: str(tmp_path / "libcudart.so.12")})
    with pytest.raises(DeviceError, match="no libcudart"):
        gpu.probe()


def test_bytes_go_to_the_device_and_back_and_only_when_waited_for(fake, rng):
    cuda = Cuda()
    stream, there = cuda.stream(), cuda.allocate(4 * 100)
    here, back = cuda.allocate_host(400), cuda.allocate_host(400)
    numbers = rng.standard_normal(100).astype(np.float32)
    fake_cuda.at(here, (100,))[:] = numbers
    cuda.copy(there, here, 400, stream)
    cuda.copy(back, there, 400, stream)
    assert not np.array_equal(fake_cuda.at(back, (100,)), numbers)  # queued, not done: the fake is worth something
    cuda.wait(stream)
    np.testing.assert_array_equal(fake_cuda.at(back, (100,)), numbers)
    assert cuda.device_address(here) == here
    assert cuda.free_bytes() == 64 << 20
    cuda.release(there)
    cuda.release_host(here)
    cuda.release_host(back)
    cuda.destroy_stream(stream)
    assert nothing_left(fake)


def test_a_graph_does_the_recorded_work_again_in_every_version(fake):
    cuda = Cuda()
    stream, a, b = cuda.stream(), cuda.allocate_host(4), cuda.allocate_host(4)
    fake_cuda.at(a, (1,))[0] = 1
    graph = cuda.capture(stream, lambda: cuda.copy(b, a, 4, stream))
    cuda.wait(stream)
    assert fake_cuda.at(b, (1,))[0] != 1  # recording does not run
    for value in (2, 3):
        fake_cuda.at(a, (1,))[0] = value
        cuda.launch(graph, stream)
        cuda.wait(stream)
        assert fake_cuda.at(b, (1,))[0] == value
    cuda.destroy_graph(graph)
    assert fake.live()["graphs"] == 0


@pytest.mark.parametrize("where", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_has_its_own_error_and_leaves_nothing(fake12, where):
    cuda = Cuda()
    stream = cuda.stream()
    fake12.fail(where, 900)
    with pytest.raises(CaptureError, match=f"{where} returned cudaErrorStreamCaptureUnsupported .900.: as asked"):
        cuda.capture(stream, lambda: None)
    fake12.fail("", 0)
    assert fake12.live()["graphs"] == 0
    cuda.wait(stream)  # it is no longer capturing


def test_work_that_fails_while_it_is_recorded_ends_the_recording(fake12):
    cuda = Cuda()
    stream = cuda.stream()
    with pytest.raises(ZeroDivisionError):
        cuda.capture(stream, lambda: 1 / 0)
    assert not fake12.capturing(stream)
    assert fake12.live()["graphs"] == 0
    assert fake12.log[-1] == "cudaGetLastError"


def test_a_recording_that_cannot_be_ended_does_not_hide_what_failed_in_it(fake12):
    cuda = Cuda()
    stream = cuda.stream()
    fake12.fail("cudaStreamEndCapture", 901)
    with pytest.raises(ZeroDivisionError):
        cuda.capture(stream, lambda: 1 / 0)
    assert fake12.log[-2:] == ["cudaStreamEndCapture", "cudaGetLastError"]
    assert fake12.live()["graphs"] == 0


@pytest.mark.parametrize(
    "name, act, what",
    [
        ("cudaMalloc", lambda cuda: cuda.allocate(1000), "a buffer of 1000 bytes on the device"),
        ("cudaHostAlloc", lambda cuda: cuda.allocate_host(1000), "a page-locked buffer of 1000 bytes"),
    ],
)
def test_out_of_memory_says_how_much_is_free_and_what_to_do(fake12, name, act, what):
    cuda = Cuda()
    fake12.fail(name, 2)
    with pytest.raises(DeviceError, match=f"Orin is out of memory: {what} failed, 64 of 8192 MiB are free; close"):
        act(cuda)
    assert "cudaGetLastError" in fake12.log


def test_out_of_memory_is_said_also_where_nobody_knows_how_much_there_is(fake12, monkeypatch):
    cuda = Cuda()
    monkeypatch.setitem(cuda.functions, "cudaMalloc", lambda *_: 2)
    fake12.fail("cudaMemGetInfo", 2)
    with pytest.raises(DeviceError, match="out of memory: a buffer of 8 bytes .* failed, free memory unknown"):
        cuda.allocate(8)


def test_a_capture_without_a_graph_is_an_error(fake12, monkeypatch):
    cuda = Cuda()
    monkeypatch.setitem(cuda.functions, "cudaStreamEndCapture", lambda *_: 0)
    with pytest.raises(CaptureError, match="nothing was recorded"):
        cuda.capture(cuda.stream(), lambda: None)


def test_a_libcudart_that_fails_at_once_says_so(fake12):
    fake12.fail("cudaRuntimeGetVersion", 3)
    with pytest.raises(DeviceError, match="libcudart does not work: cudaRuntimeGetVersion returned 3"):
        gpu.probe()


CALLS = {
    "cudaFree": lambda cuda, stream: cuda.release(cuda.allocate(4)),
    "cudaFreeHost": lambda cuda, stream: cuda.release_host(cuda.allocate_host(4)),
    "cudaHostGetDevicePointer": lambda cuda, stream: cuda.device_address(cuda.allocate_host(4)),
    "cudaMemcpyAsync": lambda cuda, stream: cuda.copy(cuda.allocate(4), cuda.allocate(4), 4, stream),
    "cudaStreamCreateWithFlags": lambda cuda, stream: cuda.stream(),
    "cudaStreamSynchronize": lambda cuda, stream: cuda.wait(stream),
    "cudaStreamDestroy": lambda cuda, stream: cuda.destroy_stream(stream),
    "cudaGraphLaunch": lambda cuda, stream: cuda.launch(cuda.capture(stream, lambda: None), stream),
    "cudaGraphExecDestroy": lambda cuda, stream: cuda.destroy_graph(cuda.capture(stream, lambda: None)),
    "cudaGraphDestroy": lambda cuda, stream: cuda.capture(stream, lambda: None),
    "cudaMemGetInfo": lambda cuda, stream: cuda.free_bytes(),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_return_code_is_checked(fake12, name):
    cuda = Cuda()
    stream = cuda.stream()
    fake12.fail(name, 700)
    with pytest.raises(DeviceError, match=f"{name} returned cudaErrorFake .700.: as asked; run: edgedetr doctor"):
        CALLS[name](cuda, stream)


def test_every_function_that_is_declared_is_covered_above():
    covered = {*CALLS, "cudaMalloc", "cudaHostAlloc", "cudaStreamBeginCapture", "cudaStreamEndCapture"}
    assert {*cudart.SIGNATURES} - {"cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError"} == covered
