"""The script around `fasa_trt.bench.e2e`, which tests/bench tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.common import main
from benchmarks.e2e import e2e
from fasa_trt.core.errors import FasaError


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main(e2e)
    assert stopped.value.code in (0, None)
    assert "Example: python -m benchmarks.e2e" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="no CUDA GPU here"):
        e2e(output=tmp_path / "e2e.json")
    assert not list(tmp_path.iterdir())
