"""From an exported model to the plan, in one go and in two."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.contract import FASA_INPUTS, LOGITS
from fasa_trt.core.engine_dir import EngineDirectory, open_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.export import finish, plugin_limits
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.export.finish import arch_of, check_tools, finish_engine, open_prepared
from fasa_trt.export.trtllm_config import check_trtllm_config
from fasa_trt.plugins import plugin_library
from tests.engines import random_profile
from tests.models import VARIANTS, make_model
from tests.plugin_engine import overrides_of

FLAGS: dict[str, Any] = {
    "target": "tensorrt-rtx",
    "lowering": "plugin",
    "dtype": "bfloat16",
    "max_seq_len": 128,
    "max_batch_size": 4,
    "max_num_tokens": 64,
    "labels": "prefix",
    "budget": 32,
    "sink": 2,
    "recent": 4,
    "dense_layers": [],
}


def make_checkpoint(variant: str, directory: Path, **overrides: Any) -> Checkpoint:
    """With heads of 128 dims, for which any plugin library that a process may have loaded before has kernels."""
    return open_checkpoint(make_model(variant, directory / "checkpoint", **{**overrides_of(variant, 128), **overrides}))


def build(checkpoint: Checkpoint, path: Path, *, stop_before_engine: bool = False, **flags: Any) -> EngineDirectory:
    config = BuildConfig.resolve(checkpoint, flags={**FLAGS, **flags})
    profile = random_profile(checkpoint)
    return build_engine(checkpoint, profile, config, path, stop_before_engine=stop_before_engine)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def check_bindings(engine: EngineDirectory) -> None:
    """The engine's bindings are those of the contract."""
    config = engine.config["pretrained_config"]
    sizes = {"layers": config["num_hidden_layers"], "vocab_padded": config["vocab_size"]}

    def wanted(binding: Any) -> list[Any]:
        shape = [-1 if isinstance(size, str) else size for size in binding.shape_of(**sizes)]
        return [binding.name, binding.dtype, shape]

    found = engine.manifest["tensorrt"]["bindings"]
    assert found == {"inputs": [wanted(binding) for binding in FASA_INPUTS], "outputs": [wanted(LOGITS)]}


# --- in one go ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds_with_the_plugin(variant: str, tmp_path: Path, plugin_named: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build(make_checkpoint(variant, tmp_path), tmp_path / "engine")
    check_bindings(engine)
    check_trtllm_config(engine.config)
    assert open_engine(engine.path).fasa["lowering"] == "plugin"
    plan = engine.model_file.read_bytes()
    assert engine.model_file.name == "model.rtx" and b"FasaAttention" in plan
    facts = engine.manifest["tensorrt"]
    assert facts["plan_bytes"] == len(plan)
    assert not facts["warnings"]
    assert not list(engine.path.glob("*.onnx*"))


def test_the_sample_model(tiny_dir: Path, tmp_path: Path, plugin_named: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build(open_checkpoint(tiny_dir), tmp_path / "engine", dtype="auto", max_seq_len=2048, arch="89")
    check_bindings(engine)
    facts = engine.manifest["tensorrt"]
    assert (facts["builder"], facts["architecture"]) == ("tensorrt_rtx", "89")
    assert facts["profile"]["max_blocks"] == [1, 64, 64]
    assert engine.manifest["plugin"] == plugin_library.describe(plugin_named)
    assert engine.manifest["settings"]["n_tip"] == 24
    assert (engine.path / "tokenizer.json").is_file()


def test_both_half_precisions(llama: Checkpoint, tmp_path: Path, plugin_named: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build(llama, tmp_path / "engine", dtype="float16")
    assert engine.config["build_config"]["plugin_config"]["gpt_attention_plugin"] == "float16"
    check_bindings(engine)


@pytest.mark.parametrize("labels", plugin_limits.READABLE)
def test_every_kind_of_label(labels: str, llama: Checkpoint, tmp_path: Path, plugin_named: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build(llama, tmp_path / "engine", labels=labels)
    check_bindings(engine)
    heads = engine.config["pretrained_config"].get("num_kv_heads_per_layer", [2, 2, 2])
    assert heads == [2 + (labels != "prefix")] * 3


# --- in two ---


@pytest.mark.parametrize("lowering", ["plugin", "standard"])
def test_two_halves_make_the_same_engine(lowering: str, tmp_path: Path, plugin_named: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    flags: dict[str, Any] = {"lowering": lowering, **({"max_num_tokens": None} if lowering == "standard" else {})}
    llama = make_checkpoint("llama", tmp_path, num_hidden_layers=1)
    build(llama, tmp_path / "prepared", stop_before_engine=True, arch="86", **flags)
    assert {"model.onnx", "model.onnx.data"} <= {file.name for file in (tmp_path / "prepared").iterdir()}
    prepared = open_prepared(tmp_path / "prepared")
    told = set()
    arch = arch_of(prepared, wanted=None, gpu=None)
    finished = finish_engine(
        prepared, tmp_path / "engine", arch=arch, facts={"command": "x"}, report=lambda stage, *_: told.add(stage)
    )
    assert "build" in told
    whole = build(llama, tmp_path / "whole", arch="86", **flags)
    assert finished.config == whole.config
    assert finished.manifest["files"].keys() == whole.manifest["files"].keys()
    assert finished.manifest["tensorrt"]["bindings"] == whole.manifest["tensorrt"]["bindings"]
    assert (finished.manifest["tensorrt"]["architecture"], arch) == ("86", "86")
    assert finished.manifest["tensorrt"]["builder_version"] == trt.__version__
    assert finished.manifest["prepared"]["settings"]["lowering"] == lowering
    assert open_engine(finished.path).model_file.is_file()


def test_a_prepared_directory_is_no_engine(llama: Checkpoint, tmp_path: Path) -> None:
    build(llama, tmp_path / "prepared", stop_before_engine=True, target="tensorrt-llm")
    with pytest.raises(FasaError, match=r"rank0.engine is not built yet \(fasa-trt build --from-onnx"):
        open_engine(tmp_path / "prepared")
    prepared = open_prepared(tmp_path / "prepared")
    assert prepared.target == "tensorrt-llm"
    check_trtllm_config(prepared.config)


def test_what_is_not_prepared(llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FasaError, match="not an engine directory"):
        open_prepared(tmp_path)
    config = BuildConfig.resolve(llama, flags={"budget": 64})
    with pytest.raises(FasaError, match="onnxruntime runs the ONNX model itself"):
        build_engine(llama, random_profile(llama), config, tmp_path / "engine", stop_before_engine=True)
    build_engine(llama, random_profile(llama), config, tmp_path / "engine")
    with pytest.raises(FasaError, match="holds no model to be built"):
        open_prepared(tmp_path / "engine")
    build(llama, tmp_path / "prepared", stop_before_engine=True)
    monkeypatch.setitem(finish.BUILDERS, "tensorrt-rtx", finish.Builder("tensorrt_rtx", "another.rtx"))
    with pytest.raises(FasaError, match="fasa.model_file must be another.rtx"):
        open_prepared(tmp_path / "prepared")


def test_architecture_to_finish_for(llama: Checkpoint, tmp_path: Path) -> None:
    """TensorRT builds for the GPU here; TensorRT for RTX for what was asked for when the model was exported."""
    prepared = build(llama, tmp_path / "rtx", stop_before_engine=True, arch="89")
    assert arch_of(prepared, wanted=None, gpu="120") == "89"
    assert [arch_of(prepared, wanted=name, gpu="120") for name in ("80", "8.0", "sm_80")] == ["80"] * 3
    with pytest.raises(FasaError, match="tensorrt-rtx engines are not made for GPU architecture '90'"):
        arch_of(prepared, wanted="90", gpu=None)
    portable = build(llama, tmp_path / "portable", stop_before_engine=True)
    assert [arch_of(portable, wanted=None, gpu=gpu) for gpu in ("86", "90", None)] == ["86", None, None]
    proper = build(llama, tmp_path / "proper", stop_before_engine=True, target="tensorrt", arch="89")
    assert [arch_of(proper, wanted=None, gpu=gpu) for gpu in ("90", None)] == ["90", None]


# --- what is missing is said before the work starts ---


def tools(target: str, *, lowering: str = "plugin", arch: str | None = None, gpu: str | None = "90") -> None:
    check_tools(target, lowering, head_dim=128, arch=arch, gpu=gpu)


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    module = None if version is None else SimpleNamespace(__name__="tensorrt", __version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)


def test_tensorrt_llm_wants_its_own_tensorrt(monkeypatch: pytest.MonkeyPatch, plugin_named: Path) -> None:
    install(monkeypatch, "10.14.1.48")
    tools("tensorrt-llm")
    for version in ("10.14.2.1", "10.15.0.1", "11.1.0"):
        install(monkeypatch, version)
        tools("tensorrt")
        with pytest.raises(
            FasaError, match=rf"TensorRT-LLM 1.2.1 .*{version} will not do: 10.14.1 is needed"
        ) as caught:
            tools("tensorrt-llm")
        assert 'pip install "tensorrt==10.14.1.*"' in str(caught.value)
    install(monkeypatch, "10.13.3")
    with pytest.raises(FasaError, match=r"10.13.3 is too old: 10.14 is needed"):
        tools("tensorrt")
    install(monkeypatch, None)
    with pytest.raises(FasaError, match=r'TensorRT is not installed.*pip install "fasa-trt\[tensorrt\]"'):
        tools("tensorrt")
    with pytest.raises(FasaError, match=r'not installed.*pip install "tensorrt==10.14.1.\*"'):
        tools("tensorrt-llm")


def test_tensorrt_builds_on_the_gpu_that_it_is_for(monkeypatch: pytest.MonkeyPatch, plugin_named: Path) -> None:
    install(monkeypatch, "11.1.0")
    tools("tensorrt", arch="90")
    with pytest.raises(FasaError, match="there is none here .*--stop-before-engine"):
        tools("tensorrt", gpu=None)
    with pytest.raises(FasaError, match="for the GPU here, sm_90, not for sm_80 .*--from-onnx"):
        tools("tensorrt", arch="80")


def test_missing_plugin_library(monkeypatch: pytest.MonkeyPatch, no_plugin: None, tmp_path: Path) -> None:
    install(monkeypatch, "11.1.0")
    with pytest.raises(FasaError, match=r"no plugin library: .*(CUDA compiler|FLASHINFER_ROOT).*fasa-trt plugin build"):
        tools("tensorrt", arch="90")
    monkeypatch.setenv(plugin_library.VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(FasaError, match="FASA_TRT_PLUGIN names .*gone.so, which is no file"):
        tools("tensorrt", arch="90")


def test_the_standard_lowering_needs_no_plugin(no_plugin: None) -> None:
    pytest.importorskip("tensorrt_rtx")
    tools("tensorrt-rtx", lowering="standard", gpu=None)
    with pytest.raises(FasaError, match="no plugin library: there is no GPU here"):
        tools("tensorrt-rtx", gpu=None)


def test_a_broken_plugin_library_leaves_no_engine(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "broken.so").write_bytes(b"\x7fELF")
    monkeypatch.setenv(plugin_library.VARIABLE, str(tmp_path / "broken.so"))
    with pytest.raises(FasaError, match="the plugin library does not load: .*broken.so"):
        build(llama, tmp_path / "engine")
    assert [file.name for file in tmp_path.iterdir()] == ["broken.so"]
