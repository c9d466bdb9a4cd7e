"""TensorRT-LLM's repository: complete by its contract, and, with a played backend, serving in a real tritonserver."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import plugin_library
from fasa_trt.runtime.generate import Engine
from fasa_trt.serving.triton.options import RepositoryOptions
from fasa_trt.serving.triton.repository import write_repository
from tests.serving.triton.engines import trtllm_engine
from tests.serving.triton.live import Triton, needs_server, serving
from tests.serving.triton.parsing import parse, type_code

PROMPT = "def add(a, b):\n    return"
UNICODE = "# é ü 漢字 🙂\ns = 'é ü 漢字"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plugin") / "libfasa_trt_plugin.so"
    file.write_bytes(b"")
    return file


@pytest.fixture(scope="module")
def trtllm_repository(engine_path: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("trtllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin_library.VARIABLE, str(plugin))
        return write_repository(trtllm_engine(engine_path, work / "engine"), work / "models", RepositoryOptions()).path


def config_of(repository: Path, model: str) -> Any:
    return parse((repository / model / "config.pbtxt").read_text("utf-8"))


def test_layout(trtllm_repository: Path) -> None:
    files = {str(path.relative_to(trtllm_repository)) for path in trtllm_repository.rglob("*") if path.is_file()}
    models = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")
    python = ("preprocessing", "postprocessing", "tensorrt_llm_bls")
    wanted = {f"{model}/config.pbtxt" for model in models} | {f"{model}/1/model.py" for model in python}
    assert files == wanted | {"start.sh", "fasa-trt.json"}
    assert (trtllm_repository / "ensemble" / "1").is_dir() and (trtllm_repository / "tensorrt_llm" / "1").is_dir()
    for model in python:  # they stand alone
        source = (trtllm_repository / model / "1" / "model.py").read_text("utf-8")
        assert not re.search(r"^\s*(from|import) fasa_trt", source, re.MULTILINE)


def test_engine_model_has_what_the_backend_needs(trtllm_repository: Path) -> None:
    config = config_of(trtllm_repository, "tensorrt_llm")
    assert (config.backend, config.max_batch_size) == ("tensorrtllm", 2)
    assert config.model_transaction_policy.decoupled
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 256
    assert list(config.dynamic_batching.preferred_batch_size) == [2]
    values = {key: value.string_value for key, value in config.parameters.items()}
    assert values["gpt_model_type"] == "inflight_fused_batching"
    assert Path(values["gpt_model_path"]) == trtllm_repository.parent / "engine"
    assert (values["enable_kv_cache_reuse"], values["enable_chunked_context"]) == ("false", "true")
    assert (values["cuda_graph_mode"], values["kv_cache_free_gpu_mem_fraction"]) == ("false", "0.9")
    asked_without_default = {"tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"}
    assert values.keys() >= asked_without_default
    assert not any("${" in value for value in values.values())
    inputs = {each.name: each for each in config.input}
    required = {name for name, each in inputs.items() if not each.optional}
    assert required == {"input_ids", "input_lengths", "request_output_len"}
    assert inputs["streaming"].HasField("reshape") and not inputs["streaming"].reshape.shape
    logits = {each.name: each.data_type for each in config.output if each.name.endswith("logits")}
    assert logits == dict.fromkeys(("context_logits", "generation_logits"), type_code("TYPE_FP32"))


def test_ensemble_connects_every_tensor(trtllm_repository: Path) -> None:
    ensemble = config_of(trtllm_repository, "ensemble")
    known = {each.name for each in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = config_of(trtllm_repository, step.model_name)
        inputs = {each.name: each for each in model.input}
        assert step.input_map.keys() <= inputs.keys()
        assert {name for name, each in inputs.items() if not each.optional} <= step.input_map.keys()
        assert set(step.input_map.values()) <= known
        assert step.output_map.keys() <= {each.name for each in model.output}
        known |= set(step.output_map.values())
    assert {each.name for each in ensemble.output} <= known
    bls = config_of(trtllm_repository, "tensorrt_llm_bls")
    assert {each.name for each in bls.input} == {each.name for each in ensemble.input}


def test_start_script_preloads_the_plugin(trtllm_repository: Path, plugin: Path, tmp_path: Path) -> None:
    told = 'echo "$LD_PRELOAD|$*"'
    (tmp_path / "tritonserver").write_text(f"#!/usr/bin/env bash\nexport LD_PRELOAD\n{told}\n")
    (tmp_path / "tritonserver").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = trtllm_repository / "start.sh"

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, "--log-verbose=1"], env={**environment, **variables}, capture_output=True, text=True, check=False
        )

    preload, _, arguments = run().stdout.strip().partition("|")
    assert preload == str(plugin)
    assert arguments.split()[0] == f"--model-repository={trtllm_repository}"
    assert "--http-address=127.0.0.1" in arguments and arguments.endswith("--log-verbose=1")
    assert "--grpc-address=0.0.0.0" in run(ADDRESS="0.0.0.0").stdout
    missing = run(FASA_TRT_PLUGIN=str(tmp_path / "none.so"))
    assert missing.returncode == 1 and missing.stdout == ""
    assert "error: no plugin library at" in missing.stderr and "none.so" in missing.stderr


def test_options_without_counterpart_are_refused(engine_path: Path, tmp_path: Path) -> None:
    engine = trtllm_engine(engine_path, tmp_path / "engine")
    for options, reason in (
        (RepositoryOptions(threads=2), "threads is for onnxruntime"),
        (RepositoryOptions(gpus=(0, 1)), "runs on one GPU"),
    ):
        with pytest.raises(FasaError, match=reason):
            write_repository(engine, tmp_path / "models", options)
    assert not (tmp_path / "models").exists()


@needs_server
@pytest.mark.slow
def test_played_backend_serves(
    engine_path: Path, engine: Engine, trtllm_repository: Path, server_python: Path, tmp_path: Path
) -> None:
    """The repository as it is, but for the engine's backend, which is played, and the start script."""
    repository = Path(shutil.copytree(trtllm_repository, tmp_path / "models"))
    config = repository / "tensorrt_llm" / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
    shutil.copyfile(Path(__file__).with_name("played_tensorrt_llm.py"), repository / "tensorrt_llm" / "1" / "model.py")
    (trtllm_repository.parent / "engine" / "played.txt").write_text(str(engine_path))
    start = write_repository(engine_path, tmp_path / "other", RepositoryOptions()).path / "start.sh"
    shutil.copyfile(start, repository / "start.sh")
    with serving(server_python, repository, tmp_path / "log") as triton:
        for model in ("ensemble", "tensorrt_llm_bls"):
            check_answers(triton, engine, model)
            check_refusals(triton, model)
        check_streams(triton, engine)


def check_answers(triton: Triton, engine: Engine, model: str) -> None:
    for prompt, length in ((PROMPT, 12), (UNICODE, 20), ("x = 1\n" * 40, 3)):
        (alone,) = engine.generate(prompt, max_new_tokens=length)
        answer = triton.generate(model, text_input=prompt, max_tokens=length)
        assert answer["text_output"] == alone.text
    options = {"text_input": PROMPT, "max_tokens": 8, "temperature": 0.7}
    assert triton.generate(model, seed=5, **options) == triton.generate(model, seed=5, **options)


def check_streams(triton: Triton, engine: Engine) -> None:
    """Whole characters, and stop strings wherever tokens end."""
    for prompt, stop in ((UNICODE, []), (PROMPT, ["\n\ndef"])):
        (alone,) = engine.generate(prompt, max_new_tokens=24, stop=stop)
        fields = {"text_input": prompt, "max_tokens": 24, "stream": True, "stop_words": stop or ["never"]}
        url = f"http://{triton.http}/v2/models/tensorrt_llm_bls/generate_stream"
        with urllib.request.urlopen(url, json.dumps(fields).encode(), timeout=60) as response:
            lines = response.read().decode("utf-8").splitlines()
        pieces = [json.loads(line.removeprefix("data: ")).get("text_output", "") for line in lines if line]
        assert "".join(pieces) == alone.text and len(pieces) > 1
        assert triton.generate("tensorrt_llm_bls", **{**fields, "stream": False})["text_output"] == alone.text


def check_refusals(triton: Triton, model: str) -> None:
    for fields, reason in (
        ({"text_input": "", "max_tokens": 3}, "the prompt is empty"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"text_input": "a " * 2000, "max_tokens": 1}, "this engine holds"),
    ):
        status, said = triton.refused(model, **fields)
        assert status >= 400 and reason in said
    assert triton.generate(model, text_input=PROMPT, max_tokens=1)["text_output"]
