"""`fasa-trt build`, `export`, `generate` and `inspect` as a user runs them, on the sample model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasa_trt.core.checkpoint import open_checkpoint
from tests.cli.conftest import Cli
from tests.engines import random_profile
from tests.models import make_model

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def profile(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    random_profile(open_checkpoint(tiny_dir)).save(path)
    return path


@pytest.fixture
def engine(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> Path:
    path = tmp_path / "engine"
    built = cli("build", "-m", tiny_dir, "--profile", profile, "-o", path, "--budget", 64, "--max-seq-len", 512)
    assert built.status == 0, built.err
    assert "target: onnxruntime" in built.err  # the default is said aloud
    assert "6 of 6 layers sparse" in built.err
    return path


def test_build_calibrates_without_a_profile(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    options = ("--samples", 1, "--length", 256, "--max-seq-len", 512, "--json")
    built = cli("build", "-m", tiny_dir, "-o", tmp_path / "engine", *options)
    assert built.status == 0, built.err
    assert json.loads(built.out)["config"]["budget"] == 256
    found = json.loads(cli("inspect", tmp_path / "engine" / "profile.safetensors", "--json").out)
    assert found["samples"] == 1
    assert found["length"] == 256


def test_generate(cli: Cli, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    text = cli("generate", engine, "--prompt-file", tmp_path / "prompt.txt", "-n", 8)
    assert text.status == 0, text.err
    assert " a + b" in text.out
    assert "prompt " in text.err
    assert "KV read" in text.err
    parsed = json.loads(cli("generate", engine, "-p", PROMPT, "-p", "import os", "-n", 8, "--json").out)
    first, second = parsed["completions"]
    assert first["text"] == text.out.rstrip("\n")
    assert len(second["tokens"]) == 8
    assert parsed["statistics"]["new_tokens"] == 16


def test_dense_reads_everything(cli: Cli, engine: Path) -> None:
    prompt = "x = 1\n" * 60
    share = {}
    for switch in ((), ("--dense",)):
        parsed = json.loads(cli("generate", engine, "-p", prompt, "-n", 4, "--json", *switch).out)
        share[switch] = parsed["statistics"]["kv_share"]
    assert share[("--dense",)] == 1.0
    assert 0.2 < share[()] < 0.8


def test_inspect(cli: Cli, engine: Path, profile: Path) -> None:
    found = json.loads(cli("inspect", engine, "--json").out)
    assert (found["target"], found["budget"], found["n_tip"], found["sparse_layers"]) == ("onnxruntime", 64, 24, 6)
    assert found["files"].keys() >= {"config.json", "model.onnx", "model.onnx.data", "profile.safetensors"}
    assert "budget" in cli("inspect", engine).out
    assert json.loads(cli("inspect", profile, "--json").out)["frequency_chunks"] == 64


def test_dry_run_writes_nothing(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    found = json.loads(cli("build", "-m", tiny_dir, "-o", tmp_path / "engine", "--dry-run", "--json").out)
    sizes = found["sizes"]
    assert sizes["kv_bytes_per_token"] == 6 * 2 * 2 * 128 * 4  # layers, keys and values, KV heads, head_dim, float32
    assert sizes["kv_read_per_token_fasa"] == 6 * 2 * 48 * 4
    assert not list(tmp_path.iterdir())


def test_config_file_flags_and_set(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"budget": 100, "sink": 2, "recent": 8, "dense_layers": [1]}))
    options = ("--config", tmp_path / "c.json", "--budget", 200, "--sink", 3, "--set", "budget=300")
    config = json.loads(cli("build", "-m", tiny_dir, *options, "--dry-run", "--json").out)["config"]
    assert (config["budget"], config["sink"], config["recent"], config["dense_layers"]) == (300, 3, 8, [1])


def test_export(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    done = cli("export", "-m", tiny_dir, "--profile", profile, "-o", file, "--dtype", "float16", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["sparse_layers"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    cli("export", "-m", tiny_dir, "-o", file).refused("exists already", "--force")


def test_a_model_without_sparse_layers_is_said(cli: Cli, tmp_path: Path) -> None:
    model = make_model("mistral-sliding", tmp_path / "model")
    random_profile(open_checkpoint(model)).save(tmp_path / "p.safetensors")
    options = ("--profile", tmp_path / "p.safetensors", "-o", tmp_path / "engine", "--budget", 64)
    assert "nothing to do" in cli("build", "-m", model, *options).err


def test_tensorrt_rtx(cli: Cli, profile: Path, tiny_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ("--target", "tensorrt-rtx", "--max-seq-len", 512, "--profile", profile, "-o", tmp_path / "engine")
    built = cli("build", "-m", tiny_dir, *options)
    assert built.status == 0, built.err
    found = json.loads(cli("inspect", tmp_path / "engine", "--json").out)
    assert (found["target"], found["dtype"], found["max_batch_size"]) == ("tensorrt-rtx", "bfloat16", 1)
    assert found["files"]["model.rtx"] > 16_000_000
    assert "model.onnx" not in found["files"]
    cli("generate", tmp_path / "engine", "-p", "x").refused("tensorrt-rtx", "--target onnxruntime")
