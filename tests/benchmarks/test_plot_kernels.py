"""The figure of the kernels' record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plot_kernels import plot_kernels
from fasa_trt.core.errors import FasaError


def points(pairs: list[tuple[float | None, float]], batch: int = 1) -> list[dict[str, Any]]:
    return [
        {"context": 512 << i, "batch": batch, "dense_us": dense, "fasa_us": fasa, "auto_us": fasa, "limit_us": fasa / 2}
        for i, (dense, fasa) in enumerate(pairs)
    ]


def test_the_figure(tmp_path: Path) -> None:
    record = tmp_path / "kernels.json"
    cases = points([(9, 10), (20, 10), (None, 12)]) + points([(9, 10), (10, 11), (11, 12)], batch=8)
    crossover = {"labels": "4bit", "n_tip": 32, "from": {"1": 1024, "8": None}, "points": cases}
    record.write_text(json.dumps({"gpu": "NVIDIA Example", "crossover": crossover}))
    plot_kernels(record)
    figure = (tmp_path / "kernels.svg").read_text("utf-8")
    for words in ("NVIDIA Example", "batch 1: faster from 1k", "batch 8: no gain", "4-bit labels"):
        assert words in figure  # matplotlib draws text as paths and names it in a comment
    plot_kernels(record, [tmp_path / "again.svg", tmp_path / "kernels.png"])
    assert (tmp_path / "again.svg").read_text("utf-8") == figure
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot read"), ("{}", "no crossover section"), ('{"crossover": {"points": []}}', "no crossover section")],
)
def test_records_without_a_figure(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(content)
    with pytest.raises(FasaError, match=message):
        plot_kernels(tmp_path / "kernels.json")
    with pytest.raises(FasaError, match="cannot read"):
        plot_kernels(tmp_path / "missing.json")
