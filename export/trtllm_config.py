"""config.json as the runtimes of TensorRT-LLM 1.2.x read it (`runtime/gptJsonConfig.cpp`), with a section of our own.

Their parser ignores keys that it does not know, and throws on required ones that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.contract import EngineLimits
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import LabelKind
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.plan import LayerPlan
from fasa_trt.export.plugin_limits import pool_kv_heads

TRTLLM = "tensorrt-llm"
ENGINE_FILE = "rank0.engine"


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    kind: its JSON type. only: the values that this project's engines may have. minimum: of numbers, or of a list's.
    required: false for keys that may be absent. null: whether null will do.
    """

    kind: type
    only: tuple[Any, ...] = ()
    minimum: int | None = None
    required: bool = True
    null: bool = False


SIZE, TRUE = Rule(int, minimum=1), Rule(bool, only=(True,))
# Dotted names. Their parser takes wider choices in places; these are the ones that a FASA engine can honour: one GPU,
# packed input, paged cache, and context chunks with a past, which chunked prefill and block reuse need.
RULES: Mapping[str, Rule] = {
    "version": Rule(str),
    "pretrained_config.architecture": Rule(str),
    "pretrained_config.dtype": Rule(str, only=("float16", "bfloat16")),
    "pretrained_config.logits_dtype": Rule(str, only=("float32",)),
    "pretrained_config.vocab_size": SIZE,
    "pretrained_config.hidden_size": SIZE,
    "pretrained_config.num_hidden_layers": SIZE,
    "pretrained_config.num_attention_heads": SIZE,
    "pretrained_config.num_key_value_heads": SIZE,
    "pretrained_config.num_kv_heads_per_layer": Rule(list, minimum=1, required=False),
    "pretrained_config.head_size": SIZE,
    "pretrained_config.mapping.tp_size": Rule(int, only=(1,)),
    "pretrained_config.mapping.pp_size": Rule(int, only=(1,)),
    "pretrained_config.quantization": Rule(dict, only=({},)),  # else the pool's dtype would not be the plugin's
    "build_config.max_batch_size": SIZE,
    "build_config.max_beam_width": Rule(int, only=(1,)),
    "build_config.max_input_len": SIZE,
    "build_config.max_seq_len": SIZE,
    "build_config.max_num_tokens": SIZE,
    "build_config.kv_cache_type": Rule(str, only=("paged",)),
    "build_config.lora_config": Rule(dict),
    "build_config.plugin_config.gpt_attention_plugin": Rule(str, only=("float16", "bfloat16")),
    "build_config.plugin_config.remove_input_padding": TRUE,
    "build_config.plugin_config.paged_kv_cache": TRUE,
    "build_config.plugin_config.tokens_per_block": Rule(int, only=(8, 16, 32, 64, 128)),
    "build_config.plugin_config.context_fmha": TRUE,
    "build_config.plugin_config.use_paged_context_fmha": TRUE,
    "build_config.plugin_config.lora_plugin": Rule(str, null=True),
    "fasa.target": Rule(str, only=(TRTLLM, "tensorrt", "tensorrt-rtx")),
    "fasa.model_file": Rule(str),
    "fasa.lowering": Rule(str, only=("plugin",)),
    "fasa.labels": Rule(str, only=("prefix", "int4", "int8", "fp8")),
    "fasa.sparse": Rule(dict),
    "fasa.layers": Rule(list),
    "fasa.eos_token_ids": Rule(list, minimum=0),
    "fasa.model": Rule(str),
    "fasa.fingerprint": Rule(str),
}


def model_sizes(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """What the `pretrained_config` of every engine says of its model."""
    hf = checkpoint.config
    return {
        "architecture": str((getattr(hf, "architectures", None) or [hf.model_type])[0]),
        "dtype": dtype,
        "vocab_size": int(hf.vocab_size),
        "hidden_size": int(hf.hidden_size),
        "num_hidden_layers": checkpoint.num_layers,
        "num_attention_heads": checkpoint.num_heads,
        "num_key_value_heads": checkpoint.num_kv_heads,
        "head_size": checkpoint.head_dim,
    }


def trtllm_config(
    checkpoint: Checkpoint,
    spec: SparseSpec,
    layers: Sequence[LayerPlan],
    limits: EngineLimits,
    *,
    dtype: str,
    labels: LabelKind = "prefix",
    target: str = TRTLLM,
    model_file: str = ENGINE_FILE,
    eos_token_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """The content of config.json for an engine that `export_plugin_onnx` exported with the same arguments.

    The runtime sizes its KV pool by it, so label heads are counted as KV heads. target: one that runs the plugin.
    Raises FasaError when the result is not what the runtime needs.
    """
    heads = pool_kv_heads(checkpoint.num_kv_heads, layers, labels)
    pretrained: dict[str, Any] = {
        **model_sizes(checkpoint, dtype),
        "logits_dtype": "float32",
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {},
    }
    if any(count != checkpoint.num_kv_heads for count in heads):
        pretrained["num_kv_heads_per_layer"] = heads
    config = {
        "version": version("fasa-trt"),
        "pretrained_config": pretrained,
        "build_config": {
            "max_batch_size": limits.max_batch_size,
            "max_beam_width": 1,
            "max_input_len": max(1, limits.max_seq_len - 1),  # a prompt, and room for one token
            "max_seq_len": limits.max_seq_len,
            "max_num_tokens": limits.max_num_tokens,
            "kv_cache_type": "paged",
            "lora_config": {},
            "plugin_config": {
                "gpt_attention_plugin": dtype,  # names no library: the runtime asks only whether it is set
                "remove_input_padding": True,
                "paged_kv_cache": True,
                "tokens_per_block": limits.tokens_per_block,
                "context_fmha": True,
                "use_paged_context_fmha": True,
                "lora_plugin": None,
            },
        },
        "fasa": {
            "target": target,
            "model_file": model_file,
            "lowering": "plugin",
            "labels": labels,
            "sparse": spec.to_json(),
            "layers": [{"n_tip": plan.n_tip, "window": plan.window} for plan in layers],
            "eos_token_ids": list(eos_token_ids),
            "model": checkpoint.path.name,
            "fingerprint": checkpoint.fingerprint,
        },
    }
    check_trtllm_config(config)
    return config


def limits_of(config: Mapping[str, Any]) -> EngineLimits:
    """The sizes that a checked config.json states."""
    build = config["build_config"]
    sizes = {name: build[name] for name in ("max_batch_size", "max_num_tokens", "max_seq_len")}
    return EngineLimits(**sizes, tokens_per_block=build["plugin_config"]["tokens_per_block"])


def check_trtllm_config(config: Mapping[str, Any]) -> None:
    """Raises FasaError that names the first key that is missing or wrong. Keys without a rule are ignored."""
    for name, rule in RULES.items():
        found, value = _find(config, name)
        if not found:
            if rule.required:
                raise FasaError(f"config.json lacks {name}", hint="build the engine again")
        elif value is not None or not rule.null:
            _check(name, value, rule)
    pretrained, build = config["pretrained_config"], config["build_config"]
    layers = pretrained["num_hidden_layers"]
    for name, values in (
        ("pretrained_config.num_kv_heads_per_layer", pretrained.get("num_kv_heads_per_layer")),
        ("fasa.layers", config["fasa"]["layers"]),
    ):
        if values is not None and len(values) != layers:
            raise FasaError(f"config.json: {name} has {len(values)} entries, the model has {layers} layers")
    if "GLM" in pretrained["architecture"]:  # the parser would ask for ChatGLM's own keys
        raise FasaError("config.json: pretrained_config.architecture must not contain GLM in capitals")
    if build["plugin_config"]["gpt_attention_plugin"] != pretrained["dtype"]:
        raise FasaError("config.json: build_config.plugin_config.gpt_attention_plugin is not the model's dtype")
    if build["max_input_len"] > build["max_seq_len"]:
        raise FasaError("config.json: build_config.max_input_len is larger than max_seq_len")
    if config["fasa"]["target"] == TRTLLM and config["fasa"]["model_file"] != ENGINE_FILE:
        raise FasaError(f"config.json: fasa.model_file must be {ENGINE_FILE}: TensorRT-LLM looks for no other name")
    limits_of(config)
    SparseSpec.from_json(config["fasa"]["sparse"])


def _find(config: Any, name: str) -> tuple[bool, Any]:
    for key in name.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return False, None
        config = config[key]
    return True, config


def _check(name: str, value: Any, rule: Rule) -> None:
    if type(value) is not rule.kind:  # true is no number
        raise FasaError(f"config.json: {name} must be of type {rule.kind.__name__}, not {value!r}")
    if rule.only and value not in rule.only:
        raise FasaError(f"config.json: {name} is {value!r}, it must be one of {', '.join(map(repr, rule.only))}")
    if rule.minimum is not None:
        numbers = value if isinstance(value, list) else [value]
        if not all(type(number) is int and number >= rule.minimum for number in numbers):
            raise FasaError(f"config.json: {name} is {value!r}, it must be at least {rule.minimum}")
