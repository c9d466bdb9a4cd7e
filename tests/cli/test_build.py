"""`fasa-trt build`, `export`, `generate` and `inspect` as a user runs them, on the sample model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.plugins import plugin_library
from tests.cli.conftest import Cli
from tests.engines import random_profile
from tests.models import make_model
from tests.plugin_library import compile_stub_plugin

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
    assert "5 of 6 layers sparse" in built.err
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


def test_more_prompts_than_the_batch_holds_take_turns(cli: Cli, engine: Path) -> None:
    done = cli("generate", engine, *["-p", "import os"] * 9, "-n", 2, "--json")
    assert done.status == 0, done.err
    texts = [completion["text"] for completion in json.loads(done.out)["completions"]]
    assert len(texts) == 9 and len(set(texts)) == 1


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
    assert (found["target"], found["budget"], found["n_tip"], found["sparse_layers"]) == ("onnxruntime", 64, 24, 5)
    assert found["files"].keys() >= {"config.json", "model.onnx", "model.onnx.data", "profile.safetensors"}
    assert "budget" in cli("inspect", engine).out
    assert json.loads(cli("inspect", profile, "--json").out)["frequency_chunks"] == 64


def test_dry_run_writes_nothing(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    found = json.loads(cli("build", "-m", tiny_dir, "-o", tmp_path / "engine", "--dry-run", "--json").out)
    sizes = found["sizes"]
    assert sizes["kv_bytes_per_token"] == 6 * 2 * 2 * 128 * 4  # layers, keys and values, KV heads, head_dim, float32
    assert sizes["kv_read_per_token_fasa"] == (5 * 2 * 48 + 2 * 2 * 128) * 4  # labels, and a dense layer
    assert not list(tmp_path.iterdir())


def test_config_file_flags_and_set(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"budget": 100, "sink": 2, "recent": 8, "dense_layers": [1]}))
    options = ("--config", tmp_path / "c.json", "--budget", 200, "--sink", 3, "--set", "budget=300")
    config = json.loads(cli("build", "-m", tiny_dir, *options, "--dry-run", "--json").out)["config"]
    assert (config["budget"], config["sink"], config["recent"], config["dense_layers"]) == (300, 3, 8, [1])


@pytest.mark.parametrize(("text", "layers"), [("none", []), ("", []), ("1, 0", [0, 1])])
def test_dense_layers(text: str, layers: list[int], cli: Cli, tiny_dir: Path) -> None:
    found = json.loads(cli("build", "-m", tiny_dir, "--dense-layers", text, "--dry-run", "--json").out)
    assert found["config"]["dense_layers"] == layers and found["sizes"]["sparse_layers"] == 6 - len(layers)


def test_export(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    done = cli("export", "-m", tiny_dir, "--profile", profile, "-o", file, "--dtype", "float16", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["sparse_layers"] == 5
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
    built = cli("build", "-m", tiny_dir, *options, "--lowering", "standard")
    assert built.status == 0, built.err
    found = json.loads(cli("inspect", tmp_path / "engine", "--json").out)
    assert (found["target"], found["dtype"], found["max_batch_size"]) == ("tensorrt-rtx", "bfloat16", 1)
    assert found["files"]["model.rtx"] > 16_000_000
    assert "model.onnx" not in found["files"]


@pytest.fixture(scope="module")
def stub_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub_plugin(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def plugin_named(stub_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin_library.VARIABLE, str(stub_plugin))


RTX = ("--target", "tensorrt-rtx", "--max-seq-len", 1024, "--labels", "prefix")


def test_the_plugin_lowering_is_said_aloud(
    cli: Cli, profile: Path, tiny_dir: Path, tmp_path: Path, plugin_named: None
) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = cli("build", "-m", tiny_dir, "--profile", profile, "-o", tmp_path / "engine", *RTX, "--arch", 89)
    assert built.status == 0, built.err
    said = " ".join(built.err.split())  # notes are wrapped
    assert "lowering plugin: tensorrt-rtx runs it, and its library is here" in said
    assert "plugin lowering, budget 256, n_tip 24, prefix labels, bfloat16, 5 of 6 layers sparse" in said
    found = json.loads(cli("inspect", tmp_path / "engine", "--json").out)
    assert (found["target"], found["max_batch_size"], found["max_num_tokens"]) == ("tensorrt-rtx", 8, 8192)
    assert "model.onnx" not in found["files"]


def test_without_the_library_the_standard_lowering_is_said_aloud(
    cli: Cli, profile: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(plugin_library.VARIABLE, raising=False)
    monkeypatch.setenv("FLASHINFER_ROOT", str(tmp_path / "nowhere"))
    options = ("--target", "tensorrt-rtx", "--dry-run", "--json", "--arch", 89)
    found = json.loads(cli("build", "-m", tiny_dir, "--profile", profile, *options).out)
    assert found["config"]["lowering"] == "standard"
    (note,) = found["notes"]
    assert note.startswith("lowering standard, not plugin: ")
    pytest.importorskip("tensorrt_rtx")
    command = ("build", "-m", tiny_dir, "--target", "tensorrt-rtx", "--lowering", "plugin", "--arch", 89)
    cli(*command, "-o", tmp_path / "engine").refused("no plugin library", "fasa-trt plugin build")


def test_a_build_in_two_halves(cli: Cli, profile: Path, tiny_dir: Path, tmp_path: Path, plugin_named: None) -> None:
    pytest.importorskip("tensorrt_rtx")
    half, engine = tmp_path / "half", tmp_path / "engine"
    built = cli("build", "-m", tiny_dir, "--profile", profile, "-o", half, *RTX, "--stop-before-engine")
    assert built.status == 0, built.err
    assert f"fasa-trt build --from-onnx {half}" in built.err
    cli("generate", half, "-p", "x").refused("stops before the engine: model.rtx is not built yet", "--from-onnx")
    cli("build", "--from-onnx", half, "-o", engine, "--budget", 5).refused("--budget was decided when", "leave it out")
    for option in (["--samples", 8], ["--dry-run"], ["--stop-before-engine"], ["--set", "budget=3"]):
        cli("build", "--from-onnx", half, "-o", engine, *option).refused(f"{option[0]} ", "leave it out")
    cli("build", "--from-onnx", half, "-o", half).refused("exists already")
    cli("build", "--from-onnx", profile, "-o", engine).refused("is not an engine directory")
    done = cli("build", "--from-onnx", half, "-o", engine, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["engine"] == str(engine)
    manifest = json.loads((engine / "manifest.json").read_text("utf-8"))
    assert manifest["prepared"]["settings"]["lowering"] == "plugin"
    assert manifest["command"].startswith("fasa-trt build --from-onnx")
    cli("build", "--from-onnx", engine, "-o", tmp_path / "third").refused("holds no model to be built")


def test_an_engine_for_tensorrt_llm_as_far_as_without_tensorrt(
    cli: Cli, profile: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    options = ("--target", "tensorrt-llm", "--labels", "prefix", "--profile", profile)
    sizes = json.loads(cli("build", "-m", tiny_dir, *options, "--dry-run", "--json").out)["sizes"]
    assert sizes["block_bytes"] == 32 * sizes["kv_bytes_per_token"] == 32 * 6 * 2 * 2 * 128 * 2
    assert "KV cache per block" in cli("build", "-m", tiny_dir, *options, "--dry-run").out
    done = cli("build", "-m", tiny_dir, *options, "-o", tmp_path / "half", "--stop-before-engine", "--json")
    assert done.status == 0, done.err
    config = json.loads((tmp_path / "half" / "config.json").read_text("utf-8"))
    assert config["fasa"]["model_file"] == "rank0.engine"
    assert config["build_config"]["plugin_config"]["paged_kv_cache"] is True


def test_export_with_the_plugin_lowering(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> None:
    options = ("--target", "tensorrt", "--labels", "prefix", "--tokens-per-block", 64, "--json")
    done = cli("export", "-m", tiny_dir, "--profile", profile, "-o", tmp_path / "m.onnx", *options)
    assert done.status == 0, done.err
    config = json.loads(done.out)["config"]
    assert (config["lowering"], config["tokens_per_block"]) == ("plugin", 64)
    assert b"FasaAttention" in (tmp_path / "m.onnx").read_bytes()
