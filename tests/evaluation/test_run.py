"""The grid: batches, records, going on after an interruption."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation import decoder as decoder_module
from fasa_trt.evaluation.methods import parse_methods
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.plots import write_plots
from fasa_trt.evaluation.report import tables_of
from fasa_trt.evaluation.results import FILE, KEY, Results, read_results, rows_of
from fasa_trt.evaluation.run import EvalPlan, run, units_of
from fasa_trt.evaluation.tasks import parse_tasks
from fasa_trt.evaluation.tasks.base import Document, Question, TaskSettings

PLAN = EvalPlan(
    parse_tasks("recall,perplexity_code"), parse_methods("fasa,quest", [48]), [512], TaskSettings(samples=2)
)
CONFIG = {"model": "fasa-tiny", "seed": 1}


def nothing(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total, stage


@pytest.fixture(scope="module")
def results(tiny: EvalModel, tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = Results.open(tmp_path_factory.mktemp("run"), CONFIG, {})
    run(tiny, PLAN, found, nothing)
    return found


def test_a_record_for_every_question_and_method(results: Results) -> None:
    recall = [record for record in results.records if record["task"] == "recall"]
    assert len(recall) == 3 * 2 * 8 and len(results.records) == len(recall) + 3 * 2
    assert len({tuple(record[name] for name in KEY) for record in results.records}) == len(results.records)
    assert {record.get("n_tip") for record in recall if record["method"] == "fasa"} == {32}
    assert {record["budget"] for record in recall if record["method"] == "dense"} == {None}
    assert all(record["prediction"] is not None and 0 <= record["depth"] < 1 for record in recall)


def test_rows_are_means_beside_dense(results: Results) -> None:
    rows = {(row["task"], row["method"]): row for row in rows_of(results.records)}
    assert len(rows) == 6
    fasa = rows["recall", "fasa"]
    mine = [r["score"] for r in results.records if (r["task"], r["method"]) == ("recall", "fasa")]
    assert fasa["score"] == pytest.approx(sum(mine) / len(mine)) and fasa["samples"] == len(mine) == 16
    assert fasa["dense_score"] == rows["recall", "dense"]["score"] >= 0.9 and fasa["solved"] is True
    assert 0 < fasa["kv_share"] < 0.3 and rows["recall", "dense"]["kv_share"] == 1.0
    assert rows["perplexity_code", "dense"]["solved"] is None
    assert rows["perplexity_code", "fasa"]["score"] >= rows["perplexity_code", "dense"]["score"]


def test_batches_do_not_change_results(tiny: EvalModel, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, one token at a time: the same answers, the same perplexity but for rounding."""
    monkeypatch.setitem(decoder_module.LOGITS, "cpu", 1)
    single = Results.open(None, {}, {})
    plan = dataclasses.replace(PLAN, methods=PLAN.methods[:2], batch_tokens=1, settings=TaskSettings(samples=1))
    run(tiny, plan, single, nothing)
    known = {tuple(record[name] for name in KEY): record for record in results.records}
    assert len(single.records) == 2 * 9
    for record in single.records:
        other = known[tuple(record[name] for name in KEY)]
        assert record["score"] == pytest.approx(other["score"], rel=1e-3)
        assert record.get("prediction") == other.get("prediction")


def test_going_on(tiny: EvalModel, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Results.open(tmp_path, CONFIG, {})
    calls = 0

    def interrupt(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, PLAN, stopped, interrupt)
    half = read_results(tmp_path / FILE)
    assert not half["complete"] and 0 < len(half["records"]) < len(results.records)

    again = Results.open(tmp_path, CONFIG, {})
    assert len(again.records) == len(half["records"])
    run(tiny, PLAN, again, nothing)
    assert again.complete and sorted(map(key_and_score, again.records)) == sorted(map(key_and_score, results.records))

    monkeypatch.setattr("fasa_trt.evaluation.run.read", None)  # nothing is read when nothing is missing
    finished = Results.open(tmp_path, CONFIG, {})
    run(tiny, PLAN, finished, nothing)
    assert len(finished.records) == len(results.records)


def key_and_score(record: dict[str, Any]) -> tuple[str, ...]:
    return (*(str(record[name]) for name in KEY), f"{record['score']:.4f}")


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    Results.open(tmp_path, CONFIG, {}).save()
    with pytest.raises(FasaError, match=r"other settings \(seed\).*--force"):
        Results.open(tmp_path, {**CONFIG, "seed": 2}, {})
    assert Results.open(tmp_path, {**CONFIG, "seed": 2}, {}, force=True).records == []


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 1}', '{"schema": 9}', '{"schema": 1, "config": {}, "records": [1]}']
)
def test_files_that_are_no_results(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(FasaError, match="results"):
        Results.open(tmp_path, CONFIG, {})


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(FasaError, match="not a directory"):
        Results.open(tmp_path / "x", CONFIG, {})


def document(name: str, tokens: int, questions: int) -> Document:
    return Document(name, range(tokens), tuple(Question(str(i), (1, 2), (), 8) for i in range(questions)))


def test_units_hold_as_much_as_fits() -> None:
    found = [document("a", 90, 3), document("b", 90, 2), document("c", 190, 1), document("d", 90, 7)]

    def shape(columns: int) -> list[list[tuple[str, int]]]:
        return [[(d.id, len(asked)) for d, asked in unit] for unit in units_of(found, columns)]

    assert shape(10_000) == [[("a", 3), ("b", 2), ("c", 1), ("d", 7)]]
    assert shape(500) == [[("a", 3), ("b", 2)], [("c", 1)], [("d", 5)], [("d", 2)]]
    assert shape(1) == [[("a", 1)]] * 3 + [[("b", 1)]] * 2 + [[("c", 1)]] + [[("d", 1)]] * 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contexts": [32768]}, "contexts of 32768 tokens are not possible"),
        ({"contexts": []}, "contexts of no tokens"),
        ({"methods": parse_methods("fasa:n_tip=65", [64])}, "n-tip 65 is out of range"),
        ({"methods": parse_methods("fasa:rule=greedy", [64])}, "no greedy order"),
        ({"contexts": [60]}, "does not fit into 60 tokens"),
    ],
)
def test_refused(tiny: EvalModel, change: dict[str, Any], words: str) -> None:
    with pytest.raises(FasaError, match=words):
        run(tiny, dataclasses.replace(PLAN, **change), Results.open(None, {}, {}), nothing)


def test_fasa_needs_a_profile(tiny: EvalModel) -> None:
    with pytest.raises(FasaError, match="--profile"):
        run(dataclasses.replace(tiny, profile=None, _plans={}), PLAN, Results.open(None, {}, {}), nothing)


def test_memory_that_runs_out(tiny: EvalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tiny.model.base_model, "forward", out_of_memory)
    with pytest.raises(FasaError, match="out of memory.*--batch-tokens"):
        run(tiny, PLAN, Results.open(None, {}, {}), nothing)


def test_ways_to_ask() -> None:
    with pytest.raises(FasaError, match="'politely'"):
        dataclasses.replace(PLAN, ask="politely")


def test_plots(results: Results, tmp_path: Path) -> None:
    rows = rows_of(results.records)
    written = write_plots(rows, results.records, tmp_path)
    assert [path.name for path in written] == ["quality-budget.svg", "quality-bytes.svg", "recall.svg"]
    first = [path.read_bytes() for path in written]
    assert all(b"<svg" in content for content in first)
    write_plots(rows, results.records, tmp_path)
    assert [path.read_bytes() for path in written] == first, "equal results give equal files"
    without = [record for record in results.records if record["task"] != "recall"]
    assert len(write_plots(rows_of(without), without, tmp_path / "other")) == 2


def test_a_task_that_dense_fails_says_so(results: Results) -> None:
    from rich.console import Console

    rows = [dict(row) for row in json.loads(json.dumps(rows_of(results.records))) if row["task"] == "recall"]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(*tables_of(rows))
    assert "does not solve" not in console.export_text()
    for row in rows:
        row["solved"] = False
    console.print(*tables_of(rows))
    text = " ".join(console.export_text().split())  # the note is broken into lines
    assert "dense attention does not solve this at 512" in text and "quest" in text
