"""The script around `fasa_trt.bench.e2e`, which tests/bench tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.e2e import e2e
from fasa_trt.core.errors import FasaError


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="no CUDA GPU here"):
        e2e(output=tmp_path / "e2e.json")
    assert not list(tmp_path.iterdir())
