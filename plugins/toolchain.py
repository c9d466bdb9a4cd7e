"""What the kernels are compiled with, and its versions: nvcc, FlashInfer's headers, TensorRT's."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from fasa_trt.core.errors import FasaError

TOOLKIT = Path("/usr/local/cuda")  # where the toolkit's own installers put or link it
WINDOWS = sys.platform == "win32"
FLASHINFER_HEADERS = (
    "include/flashinfer/attention/prefill.cuh",
    "include/flashinfer/attention/hopper/prefill_sm90.cuh",
    "cccl/libcudacxx/include/cuda/std/cstdint",
    "cutlass/include/cutlass/version.h",
)
TENSORRT_HEADERS = ("NvInferRuntime.h", "NvInferRuntimeBase.h", "NvInferRuntimePlugin.h", "NvInferVersion.h")


def find_nvcc() -> Path:
    """nvcc on PATH, under CUDA_HOME or CUDA_PATH, in pip's nvidia-cuda-nvcc, or in /usr/local/cuda. Raises FasaError
    when there is none."""
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    name = "nvcc.exe" if WINDOWS else "nvcc"
    roots = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for site in map(Path, sys.path):
        for pattern in ("cu[0-9]*", "cuda_nvcc"):  # of the wheels for CUDA 13 and for CUDA 12
            roots += sorted((site / "nvidia").glob(pattern), reverse=True) if (site / "nvidia").is_dir() else []
    for root in (*roots, TOOLKIT):
        if (root / "bin" / name).is_file():
            return root / "bin" / name
    raise FasaError(
        f"no CUDA compiler found: nvcc is not on PATH, under CUDA_HOME nor in {TOOLKIT}",
        hint="install the CUDA toolkit 12.8 or newer, or pip install nvidia-cuda-nvcc",
    )


def find_flashinfer() -> Path:
    """The folder of FlashInfer's headers: $FLASHINFER_ROOT, or the data of the installed package, which is not
    imported. Raises FasaError when there is none, or it lacks what the kernels include."""
    named = os.environ.get("FLASHINFER_ROOT")
    if named:
        roots = [Path(named), Path(named) / "data"]
    else:
        spec = importlib.util.find_spec("flashinfer")
        roots = [Path(place) / "data" for place in (spec.submodule_search_locations or [])] if spec else []
    for root in roots:
        if all((root / header).is_file() for header in FLASHINFER_HEADERS):
            return root
    if named:
        raise FasaError(
            f"FLASHINFER_ROOT names {named}, which lacks {' or '.join(FLASHINFER_HEADERS)}",
            hint="name the `data` folder of the flashinfer-python package",
        )
    raise FasaError(
        "FlashInfer's headers are not installed" if not roots else f"FlashInfer in {roots[0]} lacks its headers",
        hint="pip install --no-deps flashinfer-python (only its headers are used)",
    )


def find_tensorrt_headers() -> Path | None:
    """The folder of TensorRT's headers; None where TENSORRT_ROOT is not set. Raises FasaError when it lacks them."""
    named = os.environ.get("TENSORRT_ROOT")
    if not named:
        return None
    include = Path(named) / "include"
    if not all((include / header).is_file() for header in TENSORRT_HEADERS):
        raise FasaError(
            f"TENSORRT_ROOT names {named}, which lacks include/{' or include/'.join(TENSORRT_HEADERS)}",
            hint="unset it: TensorRT's headers are not needed",
        )
    return include


def run_nvcc(nvcc: Path, name: str, *arguments: str | Path) -> None:
    """Runs the compiler. name: of what it compiles, for the message. Raises FasaError with its first error."""
    done = subprocess.run([str(nvcc), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        message = f"nvcc failed on {name}: {lines[0] if lines else 'no message'}"
        raise FasaError(message, hint="CUDA 12.8 or newer is needed")


def tensorrt_version() -> str:
    """Of the headers that TENSORRT_ROOT names, to be added to a version; empty without it."""
    headers = find_tensorrt_headers()
    return digest(*((headers / name).read_bytes() for name in TENSORRT_HEADERS)) if headers else ""


@cache
def nvcc_version(nvcc: Path) -> str:
    """What `nvcc --version` prints. Raises FasaError when it cannot be run."""
    try:
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    except OSError as error:
        raise FasaError(f"cannot run {nvcc}: {error.strerror or error}") from None
    return done.stdout


@cache
def tools_version(nvcc: Path, flashinfer: Path | None) -> str:
    """Of the compiler and of FlashInfer's headers themselves: a folder that FLASHINFER_ROOT names need not tell its
    version."""
    headers = []
    if flashinfer:
        headers += sorted((flashinfer / "include" / "flashinfer").glob("*.cuh"))
        headers += sorted((flashinfer / "include" / "flashinfer" / "attention").rglob("*.cuh"))
        headers.append(flashinfer / "cutlass" / "include" / "cutlass" / "version.h")
    return digest(nvcc_version(nvcc), *(file.read_bytes() for file in headers))


def digest(*parts: bytes | str) -> str:
    """Of all parts, each with its length; 16 hexadecimal digits."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()[:16]
