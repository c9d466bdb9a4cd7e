"""What this machine has: packages, GPUs, compiler. Cheap: nothing heavy is imported, no CUDA context is made."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass

from fasa_trt.core.errors import FasaError

# CUdevice_attribute in cuda.h
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """compute_capability: major and minor, (8, 9) for Ada Lovelace. memory: bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Cuda:
    """The CUDA driver and what it shows. version: newest CUDA it supports, "13.0", or None without a driver."""

    version: str | None
    gpus: tuple[Gpu, ...]


def architecture(compute_capability: tuple[int, int]) -> str:
    """A compute capability as nvcc and the names of our libraries have it: "90"."""
    major, minor = compute_capability
    return f"{major}{minor}"


def package_version(module: str, *distributions: str) -> str | None:
    """The version of an importable module, without importing it; None when it is not installed.

    distributions: the packages that may provide it, when they are not called like the module.
    """
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):  # ValueError: a module in sys.modules that has no spec
        return None
    for distribution in distributions or (module,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def cuda_driver() -> ctypes.CDLL:
    """The driver's own library. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def cuda() -> Cuda:
    """Asks the driver's own library, so that CUDA_VISIBLE_DEVICES counts; a machine without one has no GPUs."""
    try:
        driver = cuda_driver()
    except OSError:
        return Cuda(None, ())
    number = ctypes.c_int()
    version = None
    if driver.cuDriverGetVersion(ctypes.byref(number)) == 0:
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return Cuda(version, ())
    return Cuda(version, tuple(_gpu(driver, ordinal) for ordinal in range(number.value)))


def nvcc_version() -> str | None:
    """The CUDA toolkit whose compiler would build the kernels; None when there is none."""
    from fasa_trt.plugins.toolchain import find_nvcc

    try:
        command = [str(find_nvcc()), "--version"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (FasaError, OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", output)
    return release.group(1) if release else "unknown"


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device, number, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)
