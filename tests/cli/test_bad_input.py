"""Every mistake that a user can make gets one line that says what is wrong and what to do, and status 1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import BertConfig, GPT2Config

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.runtime import machine
from tests.cli.conftest import Cli
from tests.engines import random_profile
from tests.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A random Llama with the sample model's tokenizer."""
    directory = make_model("llama", tmp_path_factory.mktemp("model"), vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    random_profile(open_checkpoint(model)).save(path)
    return path


@pytest.fixture
def engine(cli: Cli, model: Path, profile: Path, tmp_path: Path) -> Path:
    path = tmp_path / "engine"
    built = cli("build", "-m", model, "--profile", profile, "-o", path, "--max-seq-len", 64, "--budget", 48)
    assert built.status == 0, built.err
    return path


def build(cli: Cli, model: Path, profile: Path, tmp_path: Path, *options: object) -> object:
    return cli("build", "-m", model, "--profile", profile, "-o", tmp_path / "engine", *options)


@pytest.mark.parametrize("verb", ["calibrate", "build", "export"])
def test_no_such_model(cli: Cli, verb: str, tmp_path: Path) -> None:
    cli(verb, "-m", tmp_path / "nowhere", "-o", tmp_path / "x").refused("no such model", "nowhere", "directory")


def test_no_such_hub_model(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cli("build", "-m", "nobody/nothing", "-o", tmp_path / "x").refused(
        "no such model: nobody/nothing", "check the name"
    )


@pytest.mark.parametrize("verb", ["calibrate", "build"])
@pytest.mark.parametrize("config", [GPT2Config(), BertConfig()])
def test_model_without_rope(cli: Cli, verb: str, config: GPT2Config | BertConfig, model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    config.save_pretrained(directory)
    cli(verb, "-m", directory, "-o", tmp_path / "x").refused(config.model_type, "no rotary position embedding", "Llama")
    assert not (tmp_path / "x").exists()


def test_unsupported_architecture(cli: Cli, model: Path, profile: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "stablelm", "architectures": ["X"]}))
    random_profile(open_checkpoint(directory)).save(tmp_path / "p.safetensors")
    result = cli("build", "-m", directory, "--profile", tmp_path / "p.safetensors", "-o", tmp_path / "x")
    result.refused("'stablelm' is not supported", "supported: ", "llama", "qwen3", "olmo2")


def test_profile_of_another_model(cli: Cli, model: Path, tmp_path: Path) -> None:
    other = open_checkpoint(make_model("llama", tmp_path / "other", seed=1))
    random_profile(other).save(tmp_path / "p.safetensors")
    result = cli("build", "-m", model, "--profile", tmp_path / "p.safetensors", "-o", tmp_path / "x")
    result.refused("calibrated on another model", "fasa-trt calibrate")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "profile"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_corrupt_files(cli: Cli, name: str, damage: str, model: Path, profile: Path, tmp_path: Path) -> None:
    directory, copy = tmp_path / "model", tmp_path / "p.safetensors"
    shutil.copytree(model, directory)
    shutil.copy(profile, copy)
    file = copy if name == "profile" else directory / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\xff" * len(data))
    result = cli("build", "-m", directory, "--profile", copy, "-o", tmp_path / "x")
    result.refused(file.name)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", 0], ["budget must be at least 1", "256"]),
        (["--budget", -5], ["budget must be at least 1"]),
        (["--budget", 300], ["budget 300 is larger", "256 tokens", "--max-seq-len"]),
        (["--n-tip", 17], ["n-tip 17 is out of range", "16 frequency chunks"]),
        (["--n-tip", 0], ["n-tip 0 is out of range"]),
        (["--rule", "best"], ["unknown rule 'best'", "spread"]),
        (["--rule", "greedy"], ["no greedy order", "--greedy"]),
        (["--reduction", "max"], ["unknown reduction 'max'", "sampled_softmax"]),
        (["--dense-layers", "0,9"], ["dense layer 9 does not exist", "0 to 2"]),
        (["--dense-layers", "first"], ["not a list of layers"]),
        (["--sink", 300], ["do not fit into a budget"]),
        (["--recent", 0], ["recent >= 1"]),
        (["--max-seq-len", 100000], ["beyond the 256 positions"]),
        (["--max-batch-size", 0], ["max-batch-size must be at least 1"]),
        (["--dtype", "int8"], ["unknown dtype 'int8'"]),
        (["--target", "tpu"], ["unknown target 'tpu'", "onnxruntime"]),
        (["--target", "tensorrt-llm"], ["the plugin has no kernel for heads of 32 dims", "build for onnxruntime"]),
        (["--target", "tensorrt", "--tp-size", 2], ["tp-size 2 is not possible", "one GPU"]),
        (["--target", "tensorrt", "--lowering", "standard"], ["does not run the standard lowering", "plugin"]),
        (["--lowering", "plugin"], ["target onnxruntime does not run the plugin lowering"]),
        (["--labels", "int4"], ["int4 labels belong to the plugin lowering"]),
        (["--max-num-tokens", 64], ["max_num_tokens belongs to the plugin lowering"]),
        (["--arch", 90], ["onnxruntime engines are not made for GPU architecture '90'"]),
        (["--stop-before-engine"], ["onnxruntime runs the ONNX model itself"]),
        (["--set", "budgett=3"], ["unknown build setting 'budgett'", "budget"]),
        (["--set", "budget"], ["not key=value"]),
        (["--set", "budget=many"], ["budget must be a whole number"]),
        (["--config", "nowhere.json"], ["cannot read nowhere.json"]),
    ],
)
def test_bad_settings(
    cli: Cli, options: list[object], words: list[str], model: Path, profile: Path, tmp_path: Path
) -> None:
    cli("build", "-m", model, "--profile", profile, "-o", tmp_path / "engine", *options).refused(*words)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the plugin's kernels know."""
    directory = make_model("llama", tmp_path_factory.mktemp("model"), head_dim=128)
    random_profile(open_checkpoint(directory)).save(directory / "p.safetensors")
    return directory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n-tip", 12], ["no kernel for n-tip 12", "--n-tip 16"]),
        (["--budget", 8, "--recent", 4], ["cannot attend to 8 tokens", "16 to 4096"]),
        (["--dtype", "float32"], ["does not compute in float32", "bfloat16"]),
        (["--max-num-tokens", 10], ["max_num_tokens 10 is below 39", "a block of a prompt"]),
        (["--tokens-per-block", 24], ["tokens_per_block 24 is not possible"]),
        (["--labels", "int5"], ["unknown labels 'int5'"]),
        (["--pp-size", 2], ["pp-size 2 is not possible"]),
        (["--arch", 75], ["tensorrt-llm engines are not made for GPU architecture '75'"]),
        ([], ["TensorRT-LLM 1.2.1", "TensorRT 11.1.0 will not do: 10.14.1 is needed", "pip install"]),
        (["--target", "tensorrt"], ["TensorRT builds on the GPU that the engine is for", "--stop-before-engine"]),
    ],
)
def test_bad_plugin_settings(
    cli: Cli,
    options: list[object],
    words: list[str],
    large_heads: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a TensorRT that is too new for TensorRT-LLM, and no GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__name__="tensorrt", __version__="11.1.0"))
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda(None, ()))
    command = ("build", "-m", large_heads, "--profile", large_heads / "p.safetensors", "-o", tmp_path / "engine")
    cli(*command, "--target", "tensorrt-llm", *options).refused(*words)
    assert not list(tmp_path.iterdir())


def test_output_exists(cli: Cli, model: Path, profile: Path, engine: Path) -> None:
    again = ("build", "-m", model, "--profile", profile, "-o", engine, "--max-seq-len", 64, "--budget", 40)
    cli(*again).refused("exists already", "--force")
    assert json.loads((engine / "config.json").read_text())["fasa"]["sparse"]["budget"] == 48
    assert cli(*again, "--force").status == 0
    assert json.loads((engine / "config.json").read_text())["fasa"]["sparse"]["budget"] == 40
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


def test_force_does_not_replace_something_else(cli: Cli, model: Path, profile: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    result = cli("build", "-m", model, "--profile", profile, "-o", tmp_path / "thesis", "--force")
    result.refused("not an engine directory")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


def test_unwritable_output(cli: Cli, model: Path, profile: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("build", "-m", model, "--profile", profile, "-o", tmp_path / "file" / "engine")
    result.refused("cannot write", "permissions")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file system that can be filled")
def test_full_disk(model: Path, profile: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the write fails half-way through the weights."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from fasa_trt.cli.main import main; main()"
    )
    arguments = ["build", "-m", model, "--profile", profile, "-o", tmp_path / "engine"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "free disk space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_killed_build_leaves_nothing_half_made(cli: Cli, model: Path, profile: Path, tmp_path: Path) -> None:
    script = (
        "import time, fasa_trt.export.engine as e\n"
        "e.engine_config = lambda *a: (print('half', flush=True), time.sleep(60))\n"
        "from fasa_trt.cli.main import main; main()"
    )
    arguments = ["build", "-m", model, "--profile", profile, "-o", tmp_path / "engine", "--target", "onnxruntime"]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "engine").exists()
    assert cli(*arguments).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_interrupted_build_cleans_up(model: Path, profile: Path, tmp_path: Path) -> None:
    script = (
        "import time, fasa_trt.export.engine as e\n"
        "def stop(*a): raise KeyboardInterrupt\n"
        "e.engine_config = stop\n"
        "from fasa_trt.cli.main import main; main()"
    )
    arguments = ["build", "-m", model, "--profile", profile, "-o", tmp_path / "engine"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_generate_mistakes(cli: Cli, engine: Path, tmp_path: Path) -> None:
    cli("generate", tmp_path / "nowhere", "-p", "x").refused("not an engine directory", "fasa-trt build")
    cli("generate", engine).refused("no prompt", "--prompt")
    cli("generate", engine, "-p", "").refused("the prompt is empty")
    cli("generate", engine, "-p", "word " * 200).refused("this engine holds 64", "--max-seq-len")
    cli("generate", engine, "--prompt-file", tmp_path / "nowhere.txt").refused("cannot read", "nowhere.txt")
    cli("generate", engine, "-p", "x", "--top-p", 1.5).refused("top-p 1.5 is out of range")
    cli("generate", engine, "-p", "x", "-n", 0).refused("max-new-tokens must be at least 1")
    cli("generate", engine, "-p", "x", "--chat").refused("no chat template")


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "config.json", "tokenizer.json"])
def test_tampered_engine(cli: Cli, engine: Path, name: str) -> None:
    file = engine / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for verb in (("generate", engine, "-p", "x"), ("inspect", engine)):
        cli(*verb).refused(name, "not the file that was built")


def test_missing_engine_file(cli: Cli, engine: Path) -> None:
    (engine / "model.onnx.data").unlink()
    cli("generate", engine, "-p", "x").refused("incomplete", "model.onnx.data")


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    from fasa_trt.core.errors import FasaError

    with pytest.raises(FasaError):
        cli("build", "-m", tmp_path / "nowhere", "--debug")


def test_usage_error_has_status_2(cli: Cli) -> None:
    assert cli("build").status == 2
    both = cli("build", "-m", "model", "--from-onnx", "half")
    assert both.status == 2 and "--from-onnx" in both.err


def test_help_is_quick() -> None:
    """No heavy package is imported to print help."""
    script = (
        "import sys; sys.argv = ['fasa-trt', 'build', '--help']\n"
        "from fasa_trt.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 10
