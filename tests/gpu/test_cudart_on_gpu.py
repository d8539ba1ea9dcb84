"""cudart.py and execution_context.py against the driver: what goes in comes back, errors speak."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edgedetr.errors import DeviceError
from edgedetr.runtime.tensorrt.cudart import CaptureError, Cuda
from edgedetr.runtime.tensorrt.execution_context import Buffer


@pytest.fixture
def api(gpu):
    return Cuda(gpu)


def test_the_device_is_the_one_that_pytorch_sees(gpu, cuda):
    properties = torch.cuda.get_device_properties(0)
    assert (gpu.name, gpu.sm) == (properties.name, 10 * properties.major + properties.minor)
    assert gpu.total_bytes == pytest.approx(properties.total_memory, rel=0.02)
    assert gpu.integrated == bool(properties.is_integrated)


@pytest.mark.parametrize("shared", [False, True], ids=["copied", "mapped"])
def test_numbers_come_back_from_the_device_as_they_were(api, rng, shared):
    numbers = rng.standard_normal((37, 101)).astype(np.float32)
    stream = api.stream()
    buffers = [Buffer(Cuda(dataclasses.replace(api.device, integrated=shared)), numbers.nbytes) for _ in range(2)]
    try:
        first, second = buffers
        first.array(numbers.shape, numbers.dtype)[...] = numbers
        second.array(numbers.shape, numbers.dtype)[...] = -1
        first.upload(stream, numbers.nbytes)
        api.copy(second.address, first.address, numbers.nbytes, stream)  # on the device
        second.download(stream, numbers.nbytes)
        api.wait(stream)
        np.testing.assert_array_equal(second.array(numbers.shape, numbers.dtype), numbers)
    finally:
        for buffer in buffers:
            buffer.free()
        api.destroy_stream(stream)


def test_a_graph_does_again_what_was_recorded(api, rng):
    numbers = rng.integers(0, 255, 4096, dtype=np.uint8)
    stream, source, target = api.stream(), Buffer(api, 4096), Buffer(api, 4096)
    graph = api.capture(
        stream,
        lambda: (
            source.upload(stream, 4096),
            api.copy(target.address, source.address, 4096, stream),
            target.download(stream, 4096),
        ),
    )
    for turn in range(3):  # the addresses are the graph's, the content is new each time
        source.array((4096,), np.dtype(np.uint8))[...] = numbers + np.uint8(turn)
        api.launch(graph, stream)
        api.wait(stream)
        np.testing.assert_array_equal(target.array((4096,), np.dtype(np.uint8)), numbers + np.uint8(turn))
    api.destroy_graph(graph)
    source.free()
    target.free()
    api.destroy_stream(stream)


def test_work_that_cannot_be_recorded_is_an_error_and_the_stream_still_works(api):
    stream, buffer = api.stream(), Buffer(api, 64)
    with pytest.raises(CaptureError, match="cudaErrorStreamCapture"):
        api.capture(stream, lambda: api.wait(stream))
    buffer.array((64,), np.dtype(np.uint8))[...] = 7
    buffer.upload(stream, 64)
    buffer.download(stream, 64)
    api.wait(stream)
    assert (buffer.array((64,), np.dtype(np.uint8)) == 7).all()
    buffer.free()
    api.destroy_stream(stream)


def test_more_memory_than_there_is_names_what_is_free(api):
    with pytest.raises(DeviceError, match=rf"{api.device.name} is out of memory: .* MiB are free"):
        api.allocate(1 << 50)
    free = api.free_bytes()
    address = api.allocate(256 << 20)
    assert api.free_bytes() <= free - (200 << 20)
    api.release(address)
    assert api.free_bytes() > free - (200 << 20)
