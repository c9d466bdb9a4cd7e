"""What the machine is found to have, with drivers and compilers that are not there."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fasa_trt.plugins import toolchain
from fasa_trt.runtime import machine
from fasa_trt.runtime.machine import Cuda, Gpu


class FakeDriver:
    """Two GPUs, or what CUDA says when it cannot start."""

    def __init__(self, init: int = 0) -> None:
        self.init = init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, pointer: Any) -> int:
        pointer._obj.value = 2
        return 0

    def cuDeviceGet(self, pointer: Any, ordinal: int) -> int:
        pointer._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:
        buffer.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, pointer: Any, device: Any) -> int:
        pointer._obj.value = 24 << 30
        return 0

    def cuDeviceGetAttribute(self, pointer: Any, attribute: int, device: Any) -> int:
        pointer._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    assert machine.cuda() == Cuda("12.8", (Gpu("GPU 0", (8, 9), 24 << 30), Gpu("GPU 1", (8, 9), 24 << 30)))


def test_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(init=100))  # CUDA_ERROR_NO_DEVICE
    assert machine.cuda() == Cuda("12.8", ())


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.cuda() == Cuda(None, ())


def test_package_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.package_version("numpy") == sys.modules["numpy"].__version__
    assert machine.package_version("no_such_module") is None
    assert machine.package_version("json", "no-such-distribution", "numpy") == sys.modules["numpy"].__version__
    assert machine.package_version("json", "no-such-distribution") == "unknown"
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))  # has no spec
    assert machine.package_version("tensorrt") is None


def test_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[]))
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path)
    assert machine.nvcc_version() is None
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "nvcc")
    for output, version in (("Cuda compilation tools, release 12.8, V12.8.93", "12.8"), ("?", "unknown")):
        monkeypatch.setattr(subprocess, "run", lambda *_, said=output, **__: SimpleNamespace(stdout=said))
        assert machine.nvcc_version() == version
