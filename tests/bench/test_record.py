"""Records: facts, and the rule that runs do not mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasa_trt.bench.record import new_record, read_record, require_one_run, summary, write_record
from fasa_trt.core.errors import FasaError


def test_facts() -> None:
    first, second = new_record("e2e", "abc"), new_record("e2e")
    assert (first["benchmark"], first["commit"], second["commit"]) == ("e2e", "abc", "unknown")
    assert first["run_id"] != second["run_id"]
    assert first["cpu"] and first["versions"]["torch"]
    json.dumps(first)


def test_summary_agrees_with_numpy() -> None:
    samples = np.random.default_rng(0).random(11).tolist()
    assert list(summary(samples).values()) == pytest.approx(np.quantile(samples, [0.5, 0.25, 0.75, 0, 1]))
    assert set(summary([3.0]).values()) == {3.0}


def test_records_come_back(tmp_path: Path) -> None:
    record = new_record("e2e")
    record["rows"] = [{"run_id": record["run_id"], "dense_ms": 1.0}]
    write_record(tmp_path / "deep" / "record.json", record)
    assert read_record(tmp_path / "deep" / "record.json") == record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a record"),
        ("[]", "is not a record"),
        ({"benchmark": "e2e"}, "is not a record"),
        ({"benchmark": "e2e", "run_id": "a", "rows": [{"run_id": "b"}]}, "mixes runs a and b"),
    ],
)
def test_no_records(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(FasaError, match=message):
        read_record(file)
    with pytest.raises(FasaError, match="cannot read"):
        read_record(tmp_path / "missing.json")


def test_runs_do_not_mix() -> None:
    record = new_record("e2e")
    require_one_run([record, {**record, "benchmark": "kernels"}])
    with pytest.raises(FasaError, match="of 2 runs"):
        require_one_run([record, new_record("e2e")])
