"""The plugin library as far as building an engine needs it: the real plugin, over kernels that do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library, toolchain
from tests.plugins.tensorrt.driver import COMPILER, HERE, compile_shared, cuda_include


def compile_stub_plugin(folder: Path) -> Path:
    """With kernels "for" every head_dim; skips the test where there is no compiler or no CUDA header."""
    try:
        headers = cuda_include()
    except FasaError:
        headers = None
    if toolchain.WINDOWS or COMPILER is None or headers is None:
        pytest.skip("needs a C++ compiler and CUDA's headers")
    sources = [HERE / "kernels_stub.cpp", *sorted(library.TENSORRT.glob("*.cpp"))]
    head_dims = [f"-DFASA_HAS_{head_dim}=1" for head_dim in library.HEAD_DIMS]
    return compile_shared(folder / f"libfasa_trt_plugin{library.SUFFIX}", sources, *head_dims)
