"""The recorded evaluation, small: its rows, and what it leaves out when time is up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.eval import evaluate

SMALL: dict[str, Any] = {
    "commit": "abc", "methods": "fasa,random,triattention", "tasks": "recall,generation", "contexts": "512",
    "budgets": "48,64", "samples": 1, "new_tokens": 8, "calibration": 256, "device": "cpu",
}  # fmt: skip


def test_rows(tmp_path: Path, tiny_dir: Path) -> None:
    output = tmp_path / "eval.json"
    evaluate(model=str(tiny_dir), output=output, profile=None, limit=1000.0, **SMALL)
    found = json.loads(output.read_text("utf-8"))
    assert found["commit"] == "abc" and found["versions"]["torch"] and found["model"] == "fasa-tiny"
    assert len(found["rows"]) == 2 * (1 + 3 * 2) and found["skipped"] == []
    for row in found["rows"]:
        assert {"task", "context", "method", "budget", "n_tip", "score", "dense_score", "samples"} <= set(row)
        assert row["dense_score"] >= 0.9 and row["context"] == 512
    assert {row["n_tip"] for row in found["rows"] if row["method"] == "fasa"} == {32}


def test_out_of_time(tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "eval.json"
    evaluate(model=str(tiny_dir), output=output, profile=None, limit=0.0, **SMALL)
    found = json.loads(output.read_text("utf-8"))
    assert found["skipped"] == [{"task": "recall", "context": 512}, {"task": "generation", "context": 512}]
    assert "recall at 512: skipped" in capsys.readouterr().out
