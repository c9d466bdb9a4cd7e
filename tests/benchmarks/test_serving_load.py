"""The load benchmark, small: it counts what it got, finds wrong texts, and its figures follow from the rounds."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import serving_load as bench
from benchmarks.serving_load import Job, Tally, conclude, sample, serving_load

SMALL: dict[str, Any] = {
    "clients": 3,
    "batch": 2,
    "minutes": 0.01,
    "rounds": 1,
    "alone_seconds": 0.1,
    "max_seq_len": 160,
    "threads": 1,
}


@pytest.mark.slow
def test_small_run(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    serving_load(**SMALL, output=output)
    result = json.loads(output.read_text("utf-8"))
    assert result["wrong"] == 0, result["wrong_examples"]
    assert result["answers"] >= 3 and result["tokens"] > 3 * 32
    assert result["gain"] > 0 and len(result["resident_bytes"]) == 2
    assert result["config"]["max_batch_size"] == 2 and result["commit"]


def tally(rate: float, wrong: list[str] | None = None) -> Tally:
    return Tally(answers=2, tokens=round(10 * rate), seconds=10.0, first_text=[0.1, 0.2], wrong=wrong or [])


def test_gain_compares_neighbours() -> None:
    alone, load = [tally(100), tally(200), tally(100)], [tally(450), tally(300)]
    result = conclude(alone, load, [1000, 1010, 1020], "process_cpu_seconds_total 7.5\n")
    assert result["gains"] == pytest.approx([3.0, 2.0]) and result["gain"] == pytest.approx(2.5)
    assert result["met"] and result["server_cpu_seconds"] == 7.5
    assert result["answers"] == 4 and result["tokens"] == 7500


def test_wrong_text_or_growing_memory_misses_the_target() -> None:
    alone, fast = [tally(100), tally(100)], [tally(500)]
    assert conclude(alone, fast, [1000, 1000], "")["met"]
    assert not conclude(alone, [tally(500, ["another text"])], [1000, 1000], "")["met"]
    assert not conclude(alone, fast, [1000, 1100], "")["met"]
    assert not conclude(alone, [tally(200)], [1000, 1000], "")["met"]


def test_an_answer_that_differs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    async def chunks(*_: Any) -> Any:
        for text in ("so ", "far"):
            yield {"choices": [{"text": text}]}
        yield {"choices": [], "usage": {"completion_tokens": 2}}

    monkeypatch.setattr(bench, "chunks", chunks)
    job = Job("a", 2, 0.0, 0, "so far", 2)
    for asked, wrong in ((job, 0), (replace(job, text="so fa"), 1), (replace(job, tokens=3), 1)):
        got = Tally()
        asyncio.run(bench.ask(None, asked, got))  # type: ignore[arg-type]
        assert len(got.wrong) == wrong and got.tokens == 2 and len(got.first_text) == 1


def test_sample_adds_labels_up() -> None:
    text = 'a_total{x="1"} 2.0\na_total{x="2"} 3.0\na_total_created 9.0\nb 4.0\n'
    assert (sample(text, "a_total"), sample(text, "b"), sample(text, "c")) == (5.0, 4.0, 0.0)


def test_a_missed_target_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missed = conclude([tally(100), tally(100)], [tally(100)], [1, 1], "")

    async def measure(*_: Any, **__: Any) -> dict[str, Any]:
        return missed

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "make_jobs", lambda *_: [])
    monkeypatch.setattr(bench, "server", lambda *_: nullcontext("http://nowhere"))
    with pytest.raises(typer.Exit) as stopped:
        serving_load(**SMALL, output=tmp_path / "load.json", check=True)
    assert stopped.value.exit_code == 1
    assert not json.loads((tmp_path / "load.json").read_text("utf-8"))["met"], "recorded all the same"
