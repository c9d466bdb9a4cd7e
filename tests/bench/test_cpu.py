"""Steps on a CPU: real engines of a small model, every field of a row."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fasa_trt.bench.cpu import BLOCK, measured, random_profile, row_of, run_cpu
from fasa_trt.bench.record import new_record
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from tests.models import make_model

SPEC = SparseSpec(budget=16, n_tip=4, sink=2, recent=4)


def test_a_run(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path))
    written: list[int] = []
    record = run_cpu(
        new_record("e2e"), checkpoint, [(40, 1), (100, 3)], SPEC, repeats=7, threads=1,
        write=lambda found: written.append(len(found["rows"])),
    )  # fmt: skip
    assert written == [1, 2] and record["device"] == "cpu" and record["note"].startswith("CPU")
    for row in record["rows"]:
        assert row["run_id"] == record["run_id"]
        assert {side: len(samples) for side, samples in row["samples_ms"].items()} == dict.fromkeys(
            ("dense", "fasa", "rest"), 10
        )
        assert all(sample > 0 for samples in row["samples_ms"].values() for sample in samples)


@pytest.mark.parametrize("point", [(16, 1), (100, 0)])
def test_points(point: tuple[int, int], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path))
    with pytest.raises(FasaError, match="cannot be measured"):
        run_cpu(new_record("e2e"), checkpoint, [point], SPEC, repeats=2, threads=1, write=lambda _: None)


class Pretended:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def step(self) -> float:
        self.log.append(self.name)
        return 1.0


def test_engines_take_turns() -> None:
    log: list[str] = []
    timed = {name: Pretended(log, name) for name in ("dense", "fasa")}
    samples = measured(timed, 2 * BLOCK)  # type: ignore[arg-type]
    assert {name: len(values) for name, values in samples.items()} == {"dense": 2 * BLOCK, "fasa": 2 * BLOCK}
    turns = [log[0], *(name for before, name in pairwise(log) if name != before)]
    assert turns == ["dense", "fasa", "dense"]


def test_a_row() -> None:
    row = row_of(64, 2, {"dense": [8.0, 8.0, 20.0], "fasa": [4.0, 4.0, 4.0], "rest": [2.0, 2.0, 2.0]})
    assert (row["dense_ms"], row["fasa_ms"], row["speedup"]) == (8.0, 4.0, 2.0)
    assert row["attention_share"] == {"dense": 0.75, "fasa": 0.5}
    assert row["tokens_per_second"] == {"dense": 250.0, "fasa": 500.0}
    assert row["spread_ms"]["dense"]["max"] == 20.0


def test_random_profile_fits_its_checkpoint_and_repeats(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path))
    profile = random_profile(checkpoint, 3)
    profile.check(checkpoint.fingerprint)
    rankings = [random_profile(checkpoint, seed).ranking("spread", budget=9) for seed in (3, 3, 4)]
    assert rankings[0].shape == (3, 2, 16)
    np.testing.assert_array_equal(rankings[0], rankings[1])
    assert (rankings[0] != rankings[2]).any()
