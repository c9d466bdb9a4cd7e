"""What a build leaves behind, and what it says of it beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.engine_dir import EngineDirectory, open_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export import plugin_limits
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine, eos_token_ids
from fasa_trt.export.sizes import estimate
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from fasa_trt.runtime.traffic import kv_elements_read
from tests.engines import random_profile
from tests.models import make_model

FLAGS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 2, "budget": 40, "n_tip": 5, "dense_layers": [1]}
FILES = ["config.json", "manifest.json", "model.onnx", "model.onnx.data", "profile.safetensors"]


def checkpoint(variant: str, directory: Path, **overrides: Any) -> Checkpoint:
    return open_checkpoint(make_model(variant, directory / "tiny-model", **overrides))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("llama", tmp_path_factory.mktemp("llama"))


def build(checkpoint: Checkpoint, path: Path, *, flags: dict[str, Any] = FLAGS, **options: Any) -> EngineDirectory:
    config = BuildConfig.resolve(checkpoint, flags=flags)
    return build_engine(checkpoint, random_profile(checkpoint), config, path, **options)


@pytest.fixture(scope="module")
def engine(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> EngineDirectory:
    return build(llama, tmp_path_factory.mktemp("engine") / "engine", command="fasa-trt build")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- what is written ---


def test_files(engine: EngineDirectory) -> None:
    """The checkpoint has no tokenizer; generation_config.json counts as one of its files."""
    assert names(engine.path) == sorted([*FILES, "generation_config.json"])
    assert names(engine.path.parent) == ["engine"]
    assert open_engine(engine.path).config == engine.config


def test_config(engine: EngineDirectory, llama: Checkpoint) -> None:
    assert engine.config == {
        "version": version("fasa-trt"),
        "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "dtype": "float32",
            "vocab_size": 97,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_size": 32,
        },
        "build_config": {"max_batch_size": 2, "max_seq_len": 96},
        "fasa": {
            "target": "onnxruntime",
            "model_file": "model.onnx",
            "lowering": "standard",
            "sparse": {
                "budget": 40,
                "n_tip": 5,
                "reduction": SparseSpec.reduction,
                "rule": "spread",
                "sink": 4,
                "recent": 32,
                "dense_layers": [1],
            },
            "layers": [{"n_tip": 5, "window": None}, {"n_tip": 0, "window": None}, {"n_tip": 5, "window": None}],
            "eos_token_ids": [1],
            "model": "tiny-model",
            "fingerprint": llama.fingerprint,
        },
    }


def test_manifest(engine: EngineDirectory) -> None:
    manifest = engine.manifest
    assert manifest["command"] == "fasa-trt build"
    assert manifest["versions"]["fasa-trt"] == version("fasa-trt")
    assert {"python", "onnx", "onnxruntime", "transformers", "torch"} <= manifest["versions"].keys()
    assert manifest["machine"]
    data = (engine.path / "model.onnx.data").read_bytes()
    entry = manifest["files"]["model.onnx.data"]
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_profile_comes_along(engine: EngineDirectory, llama: Checkpoint) -> None:
    stored = Profile.load(engine.path / "profile.safetensors")
    np.testing.assert_array_equal(stored.spread, random_profile(llama).spread)
    stored.check(llama.fingerprint)


def test_layers_with_windows_and_without_rope(tmp_path: Path) -> None:
    found = build(checkpoint("gemma2", tmp_path), tmp_path / "engine").fasa["layers"]
    assert found == [{"n_tip": 0, "window": 24}, {"n_tip": 0, "window": None}, {"n_tip": 0, "window": 24}]
    flags = {**FLAGS, "dense_layers": []}
    found = build(checkpoint("smollm3", tmp_path), tmp_path / "other", flags=flags).fasa["layers"]
    assert [layer["n_tip"] for layer in found] == [5, 5, 5, 0, 5]


def test_tokenizer_comes_along(llama: Checkpoint, tiny_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(llama.path, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, directory / name)
    (directory / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    (directory / "README.md").write_text("not this", "utf-8")
    engine = build(open_checkpoint(directory), tmp_path / "engine")
    copied = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names(engine.path) == sorted([*FILES, *copied])
    for name in copied:
        assert (engine.path / name).read_bytes() == (directory / name).read_bytes()
        assert name in engine.manifest["files"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype: str, llama: Checkpoint, tmp_path: Path) -> None:
    engine = build(llama, tmp_path / "engine", flags={**FLAGS, "dtype": dtype})
    assert engine.config["pretrained_config"]["dtype"] == dtype
    model = onnx.load(str(engine.model_file), load_external_data=False)
    types = {each.name: each.data_type for each in model.graph.initializer}
    assert types["model.embed_tokens.weight"] == onnx.TensorProto.DataType.Value(dtype.upper())
    assert types["model.norm.weight"] == onnx.TensorProto.FLOAT


def test_report_tells_the_stage_and_reaches_its_end(llama: Checkpoint, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(llama, tmp_path / "engine", report=lambda *step: told.append(step))
    assert {stage for stage, _, _ in told} == {"export"}
    total = told[-1][2]
    assert [done for _, done, _ in told] == list(range(1, total + 1))


# --- other targets: TensorRT itself is tested elsewhere ---


def test_tensorrt_plan_replaces_the_onnx_model(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasa_trt.export import finish

    def build_plan(onnx_file: Path, plan_file: Path, *, progress: Any, **options: Any) -> dict[str, Any]:
        assert onnx_file.is_file() and onnx_file.with_name("model.onnx.data").is_file()
        plan_file.write_bytes(b"plan")
        progress(1, 1)
        return {**options, "seconds": 3}

    monkeypatch.setattr(finish, "build_plan", build_plan)
    monkeypatch.setattr(finish, "load_tensorrt", lambda *_: None)
    told = set()
    engine = build(
        llama,
        tmp_path / "engine",
        flags={**FLAGS, "target": "tensorrt-rtx", "lowering": "standard"},
        report=lambda stage, *_: told.add(stage),
    )
    assert told == {"export", "build"}
    assert names(engine.path) == ["config.json", "generation_config.json", "manifest.json", "model.rtx",
                                  "profile.safetensors"]  # fmt: skip
    assert (engine.target, engine.model_file.read_bytes()) == ("tensorrt-rtx", b"plan")
    facts = engine.manifest["tensorrt"]
    assert (facts["flavour"], facts["plugin"]) == ("tensorrt_rtx", None)
    assert facts["ranges"] == {"batch": [1, 2, 2], "tokens": [1, 1, 96], "logit_tokens": [1, 1, 96]}


# --- nothing half-made ---


def test_profile_of_another_model(llama: Checkpoint, tmp_path: Path) -> None:
    other = dataclasses.replace(random_profile(llama), fingerprint="0" * 64)
    config = BuildConfig.resolve(llama, flags=FLAGS)
    with pytest.raises(FasaError, match="calibrated on another model"):
        build_engine(llama, other, config, tmp_path / "engine")
    assert names(tmp_path) == []


def test_weights_that_end_too_early(llama: Checkpoint, tmp_path: Path) -> None:
    """Noticed while writing, long after the checkpoint was opened."""
    model = open_checkpoint(Path(shutil.copytree(llama.path, tmp_path / "model")))
    config, profile = BuildConfig.resolve(model, flags=FLAGS), random_profile(model)
    file = model.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FasaError, match=r"model\.safetensors ends inside tensor"):
        build_engine(model, profile, config, tmp_path / "engine")
    assert names(tmp_path) == ["model"]


def test_force(llama: Checkpoint, tmp_path: Path) -> None:
    build(llama, tmp_path / "engine")
    with pytest.raises(FasaError, match="exists already .*--force"):
        build(llama, tmp_path / "engine")
    engine = build(llama, tmp_path / "engine", flags={**FLAGS, "budget": 50}, force=True)
    assert engine.spec.budget == 50
    assert names(tmp_path) == ["engine"]


# --- end of text ---


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, 7, [7]),
        (None, [7, 8], [7, 8]),
        (None, None, []),
        ({}, 7, [7]),
        ({"eos_token_id": None}, 7, [7]),
        ({"eos_token_id": 0}, 7, [0]),
        ({"eos_token_id": [3, 4]}, 7, [3, 4]),
        ({"eos_token_id": []}, 7, []),
    ],
)
def test_eos(generation: Any, config: Any, wanted: list[int], llama: Checkpoint, tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    changed = type(llama.config)(eos_token_id=config)
    assert eos_token_ids(Checkpoint(tmp_path, changed, {})) == wanted


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_garbage_in_the_generation_config(content: str, llama: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content, "utf-8")
    with pytest.raises(FasaError, match=r"generation_config\.json is not a JSON object \(download it again\)"):
        eos_token_ids(Checkpoint(tmp_path, llama.config, {}))


# --- sizes ---


@pytest.mark.parametrize("variant", ["llama", "llama-3", "llama-tied-mha", "phi3", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_estimated_weights(variant: str, dtype: str, tmp_path: Path) -> None:
    """Norms are float32 whatever the dtype; small tensors and the graph's constants may lie in either file."""
    model = checkpoint(variant, tmp_path)
    flags = {**FLAGS, "dtype": dtype}
    expected = estimate(model, None, BuildConfig.resolve(model, flags=flags))["weight_bytes"]
    written = build(model, tmp_path / "engine", flags=flags).manifest["files"]["model.onnx.data"]["bytes"]
    assert 0.98 * expected < written < 1.02 * expected + 4096


def test_estimate_leaves_out_what_is_not_exported(llama: Checkpoint, tmp_path: Path) -> None:
    """Vision towers, a second copy of tied embeddings."""
    model = checkpoint("llama-tied-mha", tmp_path)
    config = BuildConfig.resolve(model, flags=FLAGS)
    before = estimate(model, None, config)
    tensors = load_file(model.path / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    tensors |= {"lm_head.weight": embeddings.copy(), "model.vision_tower.layers.0.weight": embeddings.copy()}
    save_file(tensors, model.path / "model.safetensors", metadata={"format": "pt"})
    assert estimate(open_checkpoint(model.path), None, config) == before


def test_estimated_cache_is_the_one_that_is_allocated(engine: EngineDirectory, llama: Checkpoint) -> None:
    sizes = estimate(llama, None, BuildConfig.resolve(llama, flags=FLAGS))
    backend = OnnxRuntimeBackend(engine, threads=1, provider="cpu")
    backend.allocate(2)
    backend.step(np.zeros((2, 1), np.int64), np.array([0, 0]), np.zeros(2, np.int64), np.zeros((2, 1), np.int64))
    assert backend.capacity == 96
    assert backend.describe()["cache_bytes"] == sizes["kv_bytes"] == 96 * 2 * sizes["kv_bytes_per_token"]


@pytest.mark.parametrize("with_profile", [True, False])
def test_estimated_reads_are_those_that_are_counted(
    with_profile: bool, engine: EngineDirectory, llama: Checkpoint
) -> None:
    profile = random_profile(llama) if with_profile else None
    sizes = estimate(llama, profile, BuildConfig.resolve(llama, flags=FLAGS))
    for length in (41, 96):
        read, dense = kv_elements_read(engine, np.array([length]), sparse=True)
        assert 4 * read == length * sizes["kv_read_per_token_fasa"] + sizes["kv_read_fixed_fasa"]
        assert 4 * dense == length * sizes["kv_read_per_token_dense"]
    assert (sizes["sparse_layers"], sizes["layers"]) == (2, 3)


def test_estimate_of_windows(tmp_path: Path) -> None:
    """Layers with a window hold a cache, and do not read more as the text grows."""
    model = checkpoint("gemma2", tmp_path)
    sizes = estimate(model, None, BuildConfig.resolve(model, flags={**FLAGS, "dense_layers": []}))
    token = 2 * 2 * 32 * 4
    assert sizes["kv_bytes_per_token"] == 3 * token
    assert sizes["kv_read_per_token_dense"] == token
    assert sizes["kv_read_per_token_fasa"] == 2 * 5 * 2 * 4
    assert sizes["kv_read_fixed_fasa"] == 40 * token
    assert (sizes["sparse_layers"], sizes["layers"]) == (1, 3)


def test_estimate_refuses_what_a_build_would(llama: Checkpoint) -> None:
    other = dataclasses.replace(random_profile(llama), fingerprint="0" * 64)
    with pytest.raises(FasaError, match="calibrated on another model"):
        estimate(llama, other, BuildConfig.resolve(llama, flags=FLAGS))


def test_estimate_of_a_greedy_rule_before_calibration(llama: Checkpoint) -> None:
    """The order is not known yet; sizes do not depend on it."""
    sizes = estimate(llama, None, BuildConfig.resolve(llama, flags={**FLAGS, "rule": "greedy"}))
    assert sizes == estimate(llama, None, BuildConfig.resolve(llama, flags=FLAGS))


def test_estimate_of_a_paged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label heads are part of the pool; a step reads the labels and not the head that they lie in."""
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix", "int4"))
    model = checkpoint("llama", tmp_path, head_dim=64)
    flags = {"target": "tensorrt-llm", "dtype": "float16", "max_seq_len": 96, "budget": 40, "dense_layers": [1]}
    prefix = estimate(model, None, BuildConfig.resolve(model, flags={**flags, "labels": "prefix", "n_tip": 16}))
    row = 2 * 64 * 2  # keys and values of a KV head
    assert prefix["kv_bytes_per_token"] == 3 * 2 * row
    assert prefix["label_bytes_per_token"] == 0
    assert prefix["block_bytes"] == 32 * prefix["kv_bytes_per_token"]
    assert prefix["kv_read_per_token_fasa"] == 2 * 2 * (2 * 16 * 2) + 2 * row
    int4 = estimate(model, None, BuildConfig.resolve(model, flags=flags))
    assert int4["label_bytes_per_token"] == 2 * row
    assert int4["kv_bytes_per_token"] == 3 * 2 * row + 2 * row
    assert int4["block_bytes"] == 32 * int4["kv_bytes_per_token"]
    assert int4["kv_read_per_token_fasa"] == 2 * 2 * (16 + 2) + 2 * row
    assert int4["kv_read_per_token_dense"] == prefix["kv_read_per_token_dense"] == 3 * 2 * row
