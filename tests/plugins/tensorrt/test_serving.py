"""Steps of in-flight batching against the reference: on a GPU with the kernels, elsewhere with loops in their place."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from fasa_trt.plugins.library import TENSORRT
from tests.plugins.tensorrt.conftest import require_compiler
from tests.plugins.tensorrt.driver import HERE, Driver, Layer, compile_shared
from tests.plugins.tensorrt.layers import DENSE, SPARSE
from tests.plugins.tensorrt.serving import LEAVE, STEPS, Serving

MIXES: dict[str, list[Layer]] = {
    "sparse and dense": [SPARSE, DENSE, {**SPARSE, "n_tip": 32}],
    "normed": [{**SPARSE, "has_qk_norm": 1}] * 3,
}


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin over kernels that are loops of the host."""
    require_compiler()
    sources = [HERE / "kernels_on_cpu.cpp", *sorted(TENSORRT.glob("*.cpp"))]
    return compile_shared(tmp_path_factory.mktemp("cpu") / "plugin.so", sources, "-O2", "-DFASA_HAS_128=1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mix", MIXES)
def test_sequences_join_and_leave(
    request: pytest.FixtureRequest, driver_code: ctypes.CDLL, device: str, mix: str, dtype: torch.dtype
) -> None:
    library = request.getfixturevalue("cpu_library" if device == "cpu" else "plugin_library")
    serving = Serving(Driver(driver_code, library), MIXES[mix], dtype, device)
    for index, (contexts, generating) in enumerate(STEPS):
        for name in LEAVE.get(index, ""):
            serving.leave(name)
        serving.step(contexts, generating)
    assert np.mean(serving.choices) > 0.6
