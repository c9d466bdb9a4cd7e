"""Memory, errors and graphs of the CUDA runtime, played on the host."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.device_memory import Device
from tests.fake_cuda import FakeCuda


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(total=1 << 20)


def test_memory_is_zero(cuda: FakeCuda) -> None:
    """A spare block that held NaN would spoil the rows that fill a batch up."""
    device = Device(cuda)
    pointer = device.allocate(64, "a test")
    device.synchronize()
    assert bytes(cuda.device_memory[pointer]) == bytes(64)
    assert not device.pinned((3, 4), np.int32).any()


def test_copies_there_and_back(cuda: FakeCuda) -> None:
    device = Device(cuda)
    source, target = device.pinned((2, 3), np.float32), device.pinned((2, 3), np.float32)
    source[:] = np.arange(6).reshape(2, 3)
    pointer = device.allocate(source.nbytes, "a test")
    device.upload(pointer, source)
    device.download(target, pointer)
    assert not target.any(), "it has not run yet"
    device.synchronize()
    assert (target == source).all()


def test_no_memory(cuda: FakeCuda) -> None:
    device = Device(cuda)
    cuda.fail["cudaMalloc"] = 0
    with pytest.raises(FasaError, match=r"the GPU has no 3 MiB for the KV cache: 1 MiB are free \(end other programs"):
        device.allocate(3 << 20, "the KV cache")


def test_graph_repeats_what_was_captured(cuda: FakeCuda) -> None:
    device = Device(cuda)
    source, pointer = device.pinned((1,), np.int32), device.allocate(4, "a test")
    graph = device.capture(lambda: device.upload(pointer, source))
    for value in (5, 6):
        source[0] = value
        device.launch(graph)
        device.synchronize()
        assert ctypes.c_int32.from_address(pointer).value == value


def test_failing_capture_leaves_the_stream_usable(cuda: FakeCuda) -> None:
    device = Device(cuda)

    def fail() -> None:
        raise FasaError("no")

    with pytest.raises(FasaError, match="no"):
        device.capture(fail)
    assert not cuda.capturing
    device.synchronize()
    assert cuda.calls["cudaGetLastError"] == 1
