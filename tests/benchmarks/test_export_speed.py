"""The export benchmark: synthetic checkpoints are sound, runs are measured, files go away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors import safe_open

from benchmarks import export_speed as script
from benchmarks.export_speed import Run, choose_shape, conclude
from benchmarks.synthetic import SHAPES, Shape, write_checkpoint
from fasa_trt.bench.cpu import random_profile
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError

TINY = Shape(hidden=64, intermediate=96, layers=3, heads=4, kv_heads=2, head_dim=16, vocab=200, tied=False)
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")


def test_a_checkpoint_of_several_shards(tmp_path: Path) -> None:
    files = write_checkpoint(TINY, tmp_path / "a", shard_bytes=60_000)
    assert len(files) > 2
    assert all(file.stat().st_size < 70_000 for file in files)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == dict(TINY.tensors())
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == TINY.nbytes
    assert checkpoint.dtype == "bfloat16" and checkpoint.num_kv_heads == 2
    with safe_open(files[0], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            array = file.get_tensor(name).float().numpy()
            np.testing.assert_array_equal(array, checkpoint.tensor(name).read().astype(np.float32))
            assert np.isfinite(array).all() and 0.01 < array.std() < 0.03

    again = write_checkpoint(TINY, tmp_path / "b", shard_bytes=60_000)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    other = write_checkpoint(TINY, tmp_path / "c", seed=1, shard_bytes=60_000)
    assert files[0].read_bytes() != other[0].read_bytes()


def test_shapes_have_the_sizes_of_their_models() -> None:
    assert SHAPES["llama-3.1-8b"].nbytes == 2 * 8_030_261_248
    assert SHAPES["llama-3.2-3b"].nbytes == 2 * 3_212_749_824


def test_the_largest_shape_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_shape("auto", 80 * 10**9) == "llama-3.1-8b"
    assert not capsys.readouterr().err
    assert choose_shape("auto", 30 * 10**9) == "llama-3.2-3b"
    assert "no room for llama-3.1-8b" in capsys.readouterr().err
    with pytest.raises(FasaError, match="not enough free disk"):
        choose_shape("llama-3.1-8b", 30 * 10**9)
    with pytest.raises(FasaError, match="unknown shape 'big'"):
        choose_shape("big", 1)


def test_conclusions_follow_from_the_runs() -> None:
    runs = [Run("copy", 10, 1, 5), Run("export", 15, 1, 5, 2 << 30), Run("export", 21, 1, 5, 3 << 30)]
    result = conclude(TINY, [*runs, Run("copy", 14, 1, 5)])
    assert result["ratio"] == pytest.approx(18 / 12)
    assert result["peak_bytes"] == 3 << 30
    assert result["met"] and len(result["runs"]) == 4
    assert not conclude(TINY, [*runs, Run("copy", 2, 1, 5)])["met"]
    assert not conclude(TINY, [*runs, Run("export", 15, 1, 5, 4 << 30), Run("copy", 14, 1, 5)])["met"]


@ON_LINUX
def test_one_copy_and_one_export(tmp_path: Path) -> None:
    shards = write_checkpoint(TINY, tmp_path / "model", shard_bytes=60_000)
    random_profile(open_checkpoint(tmp_path / "model"), 0).save(tmp_path / "profile")
    for name in ("copied", "exported"):
        (tmp_path / name).mkdir()
    script.drop_from_page_cache(shards)
    copied = script.copy(shards, tmp_path / "copied")
    assert [(tmp_path / "copied" / shard.name).read_bytes() for shard in shards] == [x.read_bytes() for x in shards]
    exported = script.export(tmp_path / "model", tmp_path / "profile", tmp_path / "exported")
    assert {file.name for file in (tmp_path / "exported").iterdir()} == {"model.onnx", "model.onnx.data"}
    for run in (copied, exported):
        assert run.seconds >= run.flush_seconds >= 0 and run.output_bytes > TINY.nbytes
    assert copied.peak_bytes is None and exported.peak_bytes is not None
    assert 50 << 20 < exported.peak_bytes < 2 << 30


def test_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", "a warning\nerror: no such profile\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FasaError, match="the export ended with status 1: error: no such profile"):
        script.export(tmp_path, tmp_path / "profile", tmp_path / "out")


@ON_LINUX
def test_the_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the export itself: the files are gone afterwards, and the exit status says whether targets were met."""
    work, output = tmp_path / "work", tmp_path / "export.json"
    work.mkdir()
    monkeypatch.setitem(SHAPES, "tiny", TINY)

    def fake_export(source: Path, profile: Path, target: Path) -> Run:
        assert profile.is_file() and not list(target.iterdir())
        return Run("export", seconds, 0.0, 1, 1 << 30)

    monkeypatch.setattr(script, "export", fake_export)
    seconds = 0.0
    script.export_speed(shape="tiny", rounds=2, work=work, output=output, check=True)
    result = json.loads(output.read_text("utf-8"))
    assert [run["kind"] for run in result["runs"]] == ["copy", "export", "export", "copy"] * 2
    assert result["met"] and result["shape"] == "tiny" and result["weight_bytes"] == TINY.nbytes and result["commit"]
    seconds = 1e6
    with pytest.raises(typer.Exit):
        script.export_speed(shape="tiny", work=work, output=output, check=True)
    assert not json.loads(output.read_text("utf-8"))["met"]
    assert not list(work.iterdir())


@ON_LINUX
def test_files_go_away_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Run:
        raise KeyboardInterrupt

    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(script, "export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.export_speed(shape="tiny", work=tmp_path, output=tmp_path / "export.json")
    assert not list(tmp_path.iterdir())


def test_no_such_work_folder(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="no such folder"):
        script.free_bytes(tmp_path / "missing")
