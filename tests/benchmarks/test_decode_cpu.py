"""The decode benchmark on a small model: figures follow from the recorded samples, the baseline is truly dense."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import typer

from benchmarks.decode_cpu import conclude, decode_cpu
from benchmarks.pair import dense_and_fasa
from fasa_trt.bench.cpu import filled
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.export.config import BuildConfig
from tests.models import make_model

SMALL: dict[str, Any] = {"context": 200, "budget": 50, "rounds": 3, "steps": 2, "threads": 1}


def test_figures_follow_from_the_samples(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    decode_cpu(model=str(make_model("llama", tmp_path / "model")), **SMALL, output=output)
    result = json.loads(output.read_text("utf-8"))
    assert result["context"] == 200 and result["batch"] == 1 and result["commit"]
    assert result["config"]["budget"] == 50 and result["config"]["n_tip"] == 6
    medians = {}
    for name, values in result["samples_ms"].items():
        assert len(values) == 6 and min(values) > 0
        medians[name] = statistics.median(values)
        assert result["step_ms"][name]["median"] == pytest.approx(medians[name], abs=1e-4)
    assert result["step_ratio"] == pytest.approx(medians["fasa"] / medians["dense"], rel=1e-2)
    assert result["attention_ms"]["dense"] == pytest.approx(medians["dense"] - medians["short"], abs=1e-3)
    assert result["met"] == (result["step_ratio"] <= result["target"])
    assert 0 < result["kv_share_read"] < 1


def test_dense_layers_read_more(tmp_path: Path) -> None:
    model, shares = str(make_model("llama", tmp_path / "model")), []
    for layers in ("none", None, "0,1"):
        output = tmp_path / f"{layers}.json"
        decode_cpu(model=model, **{**SMALL, "rounds": 2, "steps": 1}, dense_layers=layers, output=output)
        shares.append(json.loads(output.read_text("utf-8"))["kv_share_read"])
    assert shares[0] < shares[1] < shares[2] < 1


def test_the_target_is_judged_by_medians() -> None:
    samples = {"dense": [0.010, 0.020, 0.900], "fasa": [0.010, 0.010, 0.010], "short": [0.005, 0.005, 0.005]}
    result = conclude(samples)
    assert result["met"] and result["step_ratio"] == pytest.approx(0.5)
    assert result["attention_ratio"] == pytest.approx(1 / 3)
    assert not conclude({**samples, "fasa": [0.011] * 3})["met"]


def test_a_missed_target_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(make_model("llama", tmp_path / "model"))
    output = tmp_path / "decode.json"
    monkeypatch.setattr("benchmarks.decode_cpu.TARGET", 0.0)
    with pytest.raises(typer.Exit) as stopped:
        decode_cpu(model=model, **SMALL, output=output, check=True)
    assert stopped.value.exit_code == 1
    assert not json.loads(output.read_text("utf-8"))["met"], "recorded all the same"


def test_the_baseline_knows_nothing_of_fasa(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path / "model"))
    config = BuildConfig.resolve(checkpoint, flags={"budget": 50, "max_seq_len": 128})
    dense, fasa = dense_and_fasa(checkpoint, config, tmp_path, seed=0)
    names = [{value.name for value in ir.load(engine.model_file).graph.inputs} for engine in (dense, fasa)]
    assert "key.1" in names[0] and "key_label.1" in names[1]
    assert not any("label" in str(name) for name in names[0])
    nodes = {node.op_type for node in ir.load(dense.model_file).graph.all_nodes()}
    assert "TopK" not in nodes
    timed = filled(dense, 100, 1, seed=0, threads=1)
    assert timed.step() > 0 and timed.backend.capacity == 128


def test_a_context_within_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="within the budget"):
        decode_cpu(model=str(make_model("llama", tmp_path)), context=50, budget=50, output=tmp_path / "x.json")
