"""A compiler and headers that only pretend, for the tests of what finds and uses them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fasa_trt.plugins import library, toolchain

NVCC = f"""#!{sys.executable}
import pathlib, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print(pathlib.Path(__file__).with_name("version").read_text())
    sys.exit()
with open(pathlib.Path(__file__).with_name("log"), "a") as log:
    log.write(" ".join(arguments) + "\\n")
if any("broken" in argument for argument in arguments):
    sys.exit("broken.cu(1): error: expected a declaration")
pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("made")
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nvcc, FlashInfer's headers, kernels and an empty cache, which are all that is found."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    (tmp_path / "bin" / "version").write_text("release 13.0")
    for header in toolchain.FLASHINFER_HEADERS:
        file = tmp_path / "flashinfer" / header
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("// header")
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "api.cu").write_text('#include "api.h"\n#if FASA_HAS_64\n#endif\n')
    (kernels / "api.h").write_text("#pragma once\n")
    (kernels / "score.cu").write_text("// common to all\n")
    for head_dim in (64, 128):
        (kernels / f"dense_{head_dim}.cu").write_text('#include "dense.cuh"\n')
    (kernels / "dense.cuh").write_text("#include <flashinfer/attention/prefill.cuh>\n")
    monkeypatch.setattr(library, "KERNELS", kernels)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("FLASHINFER_ROOT", str(tmp_path / "flashinfer"))
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[]))
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path / "toolkit")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for cached in (toolchain.nvcc_version, toolchain.tools_version, library._load):
        cached.cache_clear()
    return tmp_path
