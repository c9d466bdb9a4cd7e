"""config.json of plugin engines: what TensorRT-LLM asks for, what engine directories need, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.contract import EngineLimits
from fasa_trt.core.engine_dir import CONFIG, open_engine, write_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import LabelKind
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.architectures import ARCHITECTURES
from fasa_trt.export.plan import LayerPlan, plan_layers
from fasa_trt.export.trtllm_config import ENGINE_FILE, RULES, check_trtllm_config, limits_of, trtllm_config
from tests.engines import random_profile
from tests.models import make_model

SPEC = SparseSpec(budget=16, n_tip=8, sink=2, recent=4, dense_layers=(0,))
LIMITS = EngineLimits(max_batch_size=4, max_num_tokens=64, max_seq_len=128, tokens_per_block=16)
Model = tuple[Checkpoint, list[LayerPlan]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = make_model("llama", tmp_path_factory.mktemp("model") / "some-llama", head_dim=64)
    checkpoint = open_checkpoint(directory)
    return checkpoint, plan_layers(checkpoint, random_profile(checkpoint), SPEC, max_seq_len=LIMITS.max_seq_len)


def made(model: Model, labels: LabelKind = "prefix", **arguments: Any) -> dict[str, Any]:
    checkpoint, layers = model
    return trtllm_config(
        checkpoint, SPEC, layers, LIMITS, dtype="bfloat16", labels=labels, eos_token_ids=[1, 5], **arguments
    )


@pytest.fixture
def config(model: Model) -> dict[str, Any]:
    return made(model)


def put(config: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for key in path:
        config = config[key]
    config[last] = value


def drop(config: dict[str, Any], name: str) -> None:
    *path, last = name.split(".")
    for key in path:
        config = config[key]
    del config[last]


def test_prefix_mode(model: Model, config: dict[str, Any]) -> None:
    assert config["pretrained_config"] == {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 64,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {},
    }
    assert config["build_config"] == {
        "max_batch_size": 4,
        "max_beam_width": 1,
        "max_input_len": 127,
        "max_seq_len": 128,
        "max_num_tokens": 64,
        "kv_cache_type": "paged",
        "lora_config": {},
        "plugin_config": {
            "gpt_attention_plugin": "bfloat16",
            "remove_input_padding": True,
            "paged_kv_cache": True,
            "tokens_per_block": 16,
            "context_fmha": True,
            "use_paged_context_fmha": True,
            "lora_plugin": None,
        },
    }
    assert config["fasa"] == {
        "target": "tensorrt-llm",
        "model_file": "rank0.engine",
        "lowering": "plugin",
        "labels": "prefix",
        "sparse": SPEC.to_json(),
        "layers": [{"n_tip": 0, "window": None}, {"n_tip": 8, "window": None}, {"n_tip": 8, "window": None}],
        "eos_token_ids": [1, 5],
        "model": "some-llama",
        "fingerprint": model[0].fingerprint,
    }


@pytest.mark.parametrize("labels", ["int4", "int8", "fp8"])
def test_label_heads_are_counted(model: Model, labels: LabelKind) -> None:
    config = made(model, labels)
    assert config["pretrained_config"]["num_key_value_heads"] == 2
    assert config["pretrained_config"]["num_kv_heads_per_layer"] == [2, 3, 3]
    assert config["fasa"]["labels"] == labels


@pytest.mark.parametrize("labels", ["prefix", "int4"])
def test_round_trip_through_an_engine_directory(model: Model, labels: LabelKind, tmp_path: Path) -> None:
    config = made(model, labels)
    with write_engine(tmp_path / "engine", force=False, facts={}) as directory:
        (directory / CONFIG).write_text(json.dumps(config), "utf-8")
        (directory / ENGINE_FILE).write_bytes(b"plan")
    engine = open_engine(tmp_path / "engine")
    assert engine.config == config
    assert engine.spec == SPEC
    assert engine.target == "tensorrt-llm"
    assert engine.model_file.read_bytes() == b"plan"
    assert (engine.max_seq_len, engine.max_batch_size) == (128, 4)
    assert limits_of(engine.config) == LIMITS
    check_trtllm_config(engine.config)


def test_other_runtimes_of_the_plugin(model: Model) -> None:
    config = made(model, target="tensorrt-rtx", model_file="model.rtx")
    assert (config["fasa"]["target"], config["fasa"]["model_file"]) == ("tensorrt-rtx", "model.rtx")
    with pytest.raises(FasaError, match="fasa.model_file must be rank0.engine"):
        made(model, model_file="model.plan")


def test_every_architecture_has_a_name_that_the_parser_takes_for_a_plain_decoder() -> None:
    special = {"DecoderModel", "EncoderModel", "MambaForCausalLM", "RecurrentGemmaForCausalLM"}
    for model_type in ARCHITECTURES:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        assert "GLM" not in name and name not in special


def test_unknown_keys_are_ignored(config: dict[str, Any]) -> None:
    put(config, "build_config.speculative_decoding_mode", 1)
    put(config, "pretrained_config.rotary_base", "anything")
    check_trtllm_config(config)


@pytest.mark.parametrize("name", RULES)
def test_every_key_is_missed_or_optional(model: Model, name: str) -> None:
    config = made(model, "int4")
    drop(config, name)
    if RULES[name].required:
        with pytest.raises(FasaError, match=f"config.json lacks {name}"):
            check_trtllm_config(config)
    else:
        check_trtllm_config(config)


@pytest.mark.parametrize("name", RULES)
def test_every_key_has_a_type(model: Model, name: str) -> None:
    config = made(model, "int4")
    wrong = 1.5  # of no rule's type
    put(config, name, wrong)
    with pytest.raises(FasaError, match=f"{name} must be of type {RULES[name].kind.__name__}, not 1.5"):
        check_trtllm_config(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pretrained_config", [], "lacks pretrained_config.architecture"),
        ("pretrained_config.architecture", "ChatGLMForCausalLM", "architecture must not contain GLM"),
        ("pretrained_config.mapping.tp_size", 2, "tp_size is 2, it must be one of 1"),
        ("pretrained_config.num_hidden_layers", True, "num_hidden_layers must be of type int, not True"),
        ("pretrained_config.num_hidden_layers", 4, "fasa.layers has 3 entries, the model has 4 layers"),
        ("pretrained_config.num_kv_heads_per_layer", [2, 3], "num_kv_heads_per_layer has 2 entries"),
        ("pretrained_config.num_kv_heads_per_layer", [2, 3, 0], "it must be at least 1"),
        ("pretrained_config.num_kv_heads_per_layer", [2, 3, "3"], "it must be at least 1"),
        ("pretrained_config.quantization", {"kv_cache_quant_algo": "FP8"}, "quantization is .*, it must be one of {}"),
        ("pretrained_config.dtype", "float16", "gpt_attention_plugin is not the model's dtype"),
        ("pretrained_config.dtype", "float32", "dtype is 'float32', it must be one of 'float16', 'bfloat16'"),
        ("build_config.max_batch_size", 0, "max_batch_size is 0, it must be at least 1"),
        ("build_config.max_batch_size", 65, "max_num_tokens 64 is below 80"),
        ("build_config.max_input_len", 129, "max_input_len is larger than max_seq_len"),
        ("build_config.kv_cache_type", "continuous", "kv_cache_type is 'continuous'"),
        ("build_config.plugin_config.gpt_attention_plugin", None, "must be of type str, not None"),
        ("build_config.plugin_config.tokens_per_block", 48, "tokens_per_block is 48"),
        ("build_config.plugin_config.use_paged_context_fmha", False, "use_paged_context_fmha is False"),
        ("fasa.eos_token_ids", ["</s>"], "eos_token_ids is .*</s>"),
        ("fasa.sparse", {"budget": 16}, "not a sparse specification: n_tip is missing"),
        ("fasa.target", "onnxruntime", "target is 'onnxruntime'"),
    ],
)
def test_wrong_values_are_refused(config: dict[str, Any], name: str, value: Any, message: str) -> None:
    check_trtllm_config(copy.deepcopy(config))
    put(config, name, value)
    with pytest.raises(FasaError, match=message):
        check_trtllm_config(config)
