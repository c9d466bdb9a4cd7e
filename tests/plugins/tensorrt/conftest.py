"""The driver and the library that it drives."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library, toolchain
from fasa_trt.plugins.plugin_library import provide
from fasa_trt.runtime.machine import architecture
from tests.plugins.tensorrt.driver import (
    COMPILER,
    HERE,
    Driver,
    compile_cpu_library,
    compile_driver,
    compile_shared,
    cuda_include,
)


def official_headers() -> Path | None:
    root = os.environ.get("TENSORRT_ROOT")
    return Path(root) / "include" if root else None


def require_compiler() -> None:
    if toolchain.WINDOWS or COMPILER is None or cuda_include() is None:
        pytest.skip("needs a C++ compiler and CUDA's headers")


@pytest.fixture(scope="session", params=["ours", "official"])
def headers(request: pytest.FixtureRequest) -> Path | None:
    """Where the driver has TensorRT's interface from; None for our declarations."""
    require_compiler()
    if request.param == "official" and official_headers() is None:
        pytest.skip("needs TENSORRT_ROOT")
    return official_headers() if request.param == "official" else None


@pytest.fixture(scope="session")
def plugin_library() -> Path:
    """The real one, for this machine's GPU or, without one, any."""
    try:
        toolchain.find_nvcc(), toolchain.find_flashinfer()
    except FasaError as error:
        pytest.skip(str(error))
    return provide(128, architecture(torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)))


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_compiler()
    return compile_cpu_library(tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, with our declarations, over kernels that only write down how they are called."""
    require_compiler()
    sources = [HERE / "kernels_stub.cpp", *sorted(library.TENSORRT.glob("*.cpp"))]
    return compile_shared(tmp_path_factory.mktemp("stub") / "plugin.so", sources, "-DFASA_HAS_128=1")


@pytest.fixture(scope="session")
def driver_code(headers: Path | None, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_driver(tmp_path_factory.mktemp("driver"), headers)


@pytest.fixture
def driver(driver_code: ctypes.CDLL, plugin_library: Path) -> Driver:
    return Driver(driver_code, plugin_library)


@pytest.fixture
def stub_driver(driver_code: ctypes.CDLL, stub_library: Path) -> Driver:
    return Driver(driver_code, stub_library)
