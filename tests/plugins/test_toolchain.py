"""Finding the compiler and FlashInfer's headers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import toolchain

pytestmark = pytest.mark.skipif(toolchain.WINDOWS, reason="the stand-in for nvcc is a POSIX script")


def test_no_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FasaError, match="no CUDA compiler") as caught:
        toolchain.find_nvcc()
    assert "nvidia-cuda-nvcc" in (caught.value.hint or "")


@pytest.mark.parametrize("folder", ["cu13", "cuda_nvcc"])
def test_the_compiler_of_pip(folder: str, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    nvcc = tools / "nvidia" / folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[str(tools)]))
    assert toolchain.find_nvcc() == nvcc


def test_the_compiler_of_cuda_home(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tools))
    assert toolchain.find_nvcc() == tools / "bin" / "nvcc"


def test_the_compiler_of_the_toolkit_comes_last(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    nvcc = toolchain.TOOLKIT / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    assert toolchain.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_PATH", str(tools))
    assert toolchain.find_nvcc() == tools / "bin" / "nvcc"


def test_flashinfer_is_found_without_importing_it(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_ROOT")
    package = tools / "site" / "flashinfer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('heavy')\n")
    (tools / "flashinfer").rename(package / "data")
    monkeypatch.setattr(sys, "path", [str(tools / "site")])
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    assert toolchain.find_flashinfer() == package / "data"
    (package / "data" / toolchain.FLASHINFER_HEADERS[0]).unlink()
    with pytest.raises(FasaError, match="lacks its headers"):
        toolchain.find_flashinfer()


def test_no_flashinfer(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_ROOT")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    with pytest.raises(FasaError, match="FlashInfer's headers are not installed") as caught:
        toolchain.find_flashinfer()
    assert "pip install --no-deps flashinfer-python" in (caught.value.hint or "")
