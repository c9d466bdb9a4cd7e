"""Finds nvcc, builds the kernel library for a GPU architecture, caches it and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from fasa_trt.core.errors import FasaError

KERNELS = Path(__file__).resolve().parent / "kernels"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
WINDOWS = sys.platform == "win32"
SUFFIX = ".dll" if WINDOWS else ".so"


def cache_directory() -> Path:
    """Where built libraries are kept: $FASA_TRT_CACHE, else the user's cache directory."""
    named = os.environ.get("FASA_TRT_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("LOCALAPPDATA") if WINDOWS else os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fasa-trt"


def find_nvcc() -> Path:
    """nvcc on PATH, under CUDA_HOME or CUDA_PATH, or in pip's nvidia-cuda-nvcc. Raises FasaError when there is none."""
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    name = "nvcc.exe" if WINDOWS else "nvcc"
    roots = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for site in map(Path, sys.path):
        roots += sorted((site / "nvidia").glob("cu*")) if (site / "nvidia").is_dir() else []
    for root in roots:
        if (root / "bin" / name).is_file():
            return root / "bin" / name
    raise FasaError(
        "no CUDA compiler found: nvcc is not on PATH nor under CUDA_HOME",
        hint="install the CUDA toolkit 12.8 or newer, or pip install nvidia-cuda-nvcc",
    )


def build(architecture: str, *, force: bool = False) -> Path:
    """The kernel library for compute capability `architecture` ("90" for 9.0), built unless the cache has it.

    The cache is keyed by the sources' content, so an edited kernel is always rebuilt. Raises FasaError when the
    architecture is unknown, there is no compiler, or it fails.
    """
    if architecture not in ARCHITECTURES:
        raise FasaError(f"unknown GPU architecture {architecture!r}", hint=f"one of {', '.join(ARCHITECTURES)}")
    sources = sorted(KERNELS.glob("*.cu"))
    digest = hashlib.sha256()
    for file in sorted(KERNELS.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    target = cache_directory() / f"libfasa_kernels-sm{architecture}-{digest.hexdigest()[:16]}{SUFFIX}"
    if target.is_file() and not force:
        return target
    nvcc = find_nvcc()
    work = target.with_name(f".{target.stem}.{os.getpid()}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xcompiler", "/MD" if WINDOWS else "-fPIC"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: _run(nvcc, *flags, "-c", file, "-o", work / f"{file.stem}.o"), sources))
        library = work / f"library{SUFFIX}"
        _run(nvcc, "-shared", "-cudart", "static", *sorted(work.glob("*.o")), "-o", library)
        library.replace(target)
    except OSError as error:
        raise FasaError(f"cannot write {target.parent}: {error.strerror or error}", hint="set FASA_TRT_CACHE") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


@cache
def load(architecture: str) -> ctypes.CDLL:
    """The library for a GPU, built on first use."""
    return ctypes.CDLL(str(build(architecture)))


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise FasaError(f"nvcc failed: {lines[0] if lines else 'no message'}", hint="CUDA 12.8 or newer is needed")
