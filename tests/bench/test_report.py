"""Reports: every figure of the record, one file, nothing from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fasa_trt.bench.plot import STEP_LINES, context_name, latency_svg
from fasa_trt.bench.record import new_record
from fasa_trt.bench.report import html_report, tables_of
from fasa_trt.core.errors import FasaError


def step_row(context: int, batch: int) -> dict[str, Any]:
    return {
        "context": context, "batch": batch, "dense_ms": 7.25, "fasa_ms": 4.0, "rest_ms": 3.0, "speedup": 1.8125,
        "dense_kernel": "torch SDPA <flash>", "attention_share": {"dense": 0.586, "fasa": 0.25},
        "tokens_per_second": {"dense": 138.0, "fasa": 250.0},
    }  # fmt: skip


def steps() -> dict[str, Any]:
    rows = [step_row(32768, 1), step_row(131072, 1), step_row(32768, 8)]
    return {
        **new_record("e2e", "abc"),
        "shape": "llama-3.1-8b",
        "gpu": "NVIDIA Example",
        "note": "a note",
        "rows": rows,
    }


def kernels() -> dict[str, Any]:
    row = {"context": 4096, "batch": 1, "labels": "4bit", "n_tip": 32, "reduction": "sum", "fasa_us": 5.0}
    rows = [{**row, "dense_us": 20.0, "dense_kernel": "XQA"}, {**row, "dense_us": None, "dense_kernel": None}]
    points = [{"context": 4096, "batch": 1, "dense_us": None, "fasa_us": 5.0, "limit_us": 2.0}]
    return {**new_record("kernels"), "rows": rows, "crossover": {"points": points}}


def test_a_page() -> None:
    record = steps()
    page = html_report([record])
    for words in ("NVIDIA Example", "32k x 8", "7.250", "1.81x", "59%", "a note", record["run_id"], "abc"):
        assert words in page
    assert "torch SDPA &lt;flash&gt;" in page and "<flash>" not in page
    assert page.count("<svg") == 1 and "batch 8" in page
    assert not re.search(r'(src|href)="(?!#)', page), "the page needs something else"
    assert html_report([record]) == page


def test_kernels_stand_beside_steps_of_the_same_run() -> None:
    first, second = steps(), kernels()
    with pytest.raises(FasaError, match="of 2 runs"):
        html_report([first, second])
    page = html_report([first, {**second, "run_id": first["run_id"]}])
    assert page.count("<svg") == 2 and "4.00x" in page
    assert tables_of(second)[0].rows[1][4:] == ("-", "5.0", "-", "-")
    assert tables_of({**second, "rows": []}) == []
    with pytest.raises(FasaError, match="no report for records of 'recall'"):
        tables_of(new_record("recall"))


def test_figures() -> None:
    rows = [step_row(1000, 2), {**step_row(2048, 2), "fasa_ms": None}]
    drawn = latency_svg(rows, STEP_LINES, "ms")
    assert drawn.startswith("<svg") and drawn == latency_svg(rows, STEP_LINES, "ms")
    assert (context_name(1000), context_name(131072)) == ("1000", "128k")
