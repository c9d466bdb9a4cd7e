"""The comparison of kernel libraries, as far as it goes without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.libraries import compared, libraries, loaded, parsed, reported, steps
from fasa_trt.bench import e2e
from fasa_trt.bench.linears import Choice
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library as builds


def test_points() -> None:
    assert parsed("32768x1,131072x8") == [(32768, 1), (131072, 8)]
    for wrong in ("32768", "x", "1x2x3", "ax1", ""):
        with pytest.raises(FasaError, match="points are not"):
            parsed(wrong)


def test_unknown_labels(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match=r"no such labels: \['int2'\]"):
        libraries([tmp_path / "a.so"], labels="int4,int2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="no CUDA GPU here"):
        libraries([tmp_path / "a.so"], output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_what_is_no_library(tmp_path: Path) -> None:
    usual = builds.load
    for name in ("absent.so", "text.so"):
        (tmp_path / "text.so").write_text("no library")
        with pytest.raises(FasaError, match=f"cannot load .*{name}"), loaded(tmp_path / name):
            pass
    assert builds.load is usual


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_libraries_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call runs the library whose turn it is, and its results are compared with the first one's."""
    files = [tmp_path / "one.so", tmp_path / "two.so"]
    for value, file in enumerate(files, start=1):
        source = tmp_path / "answer.c"
        source.write_text(f"int answer(void) {{ return {value}; }}")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
    turns: list[int] = []

    def call() -> torch.Tensor:
        return torch.tensor(builds.load("90", (128,)).answer())

    def timed(calls: list[object], repeats: int) -> list[float]:
        turns.append(int(call()))
        return [float(call())] * repeats

    monkeypatch.setattr("benchmarks.libraries.replay_us", timed)
    usual = builds.load
    found, errors = compared(files, [call], rounds=2)
    assert found == {str(files[0]): [1.0, 1.0], str(files[1]): [2.0, 2.0]}
    assert errors == [0.0, 1.0] and turns == [1, 2, 1, 2] and builds.load is usual


def test_whole_steps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: Any = SimpleNamespace(head_dim=128, layers=[None] * 3)
    linears = Choice()
    times = iter([5.0, 4.0, 5.1, 3.9, 5.2, 4.1, 5.3, 3.8])

    def measure(*arguments: object) -> dict[str, float]:
        assert arguments[:4] == (weights, 4096, 1, 3) and arguments[6] is linears
        return {"dense_ms": next(times), "fasa_ms": next(times)}

    monkeypatch.setattr("benchmarks.libraries.loaded", lambda file: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    monkeypatch.setattr(e2e, "buffers_of", lambda *arguments: 3)
    monkeypatch.setattr(e2e, "measure", measure)
    found = steps([Path("one.so"), Path("two.so")], weights, linears, 4096, 1, rounds=2)
    assert found == {
        "dense step": {"one.so": [5.0, 5.2], "two.so": [5.1, 5.3]},
        "step": {"one.so": [4.0, 4.1], "two.so": [3.9, 3.8]},
    }
    monkeypatch.setattr(e2e, "buffers_of", lambda *arguments: 0)
    with pytest.raises(FasaError, match="no memory for whole steps at 4096 x 1"):
        steps([Path("one.so")], weights, linears, 4096, 1, rounds=1)


def test_row(capsys: pytest.CaptureFixture[str]) -> None:
    row = reported(32768, 1, "int4", {"a/before.so": [16.0, 16.5], "after.so": [14.0, 14.4]}, [0.0, 0.0])
    assert row["best"] == {"a/before.so": 16.0, "after.so": 14.0}
    assert "before.so 16.00 (+0.0%, +-0.25), after.so 14.00 (-12.5%, +-0.20)" in capsys.readouterr().out
