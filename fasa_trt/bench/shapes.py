"""Models whose decode step is measured: by name, as a transformers config, or as a checkpoint."""

from __future__ import annotations

from typing import Any

from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import window_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> (model_type, the fields of the model's config.json that matter here)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
}
PLAIN = ("llama", "mistral", "qwen2", "qwen3")


def config_of(shape: str) -> Any:
    """The transformers config of a named shape. Raises FasaError for an unknown name."""
    if shape not in SHAPES:
        raise FasaError(f"unknown shape {shape!r}", hint=f"one of {', '.join(SHAPES)}")
    from transformers import CONFIG_MAPPING

    model_type, fields = SHAPES[shape]
    return CONFIG_MAPPING[model_type](**fields)


def check_config(config: Any) -> None:
    """Raises FasaError unless the decode loop computes this model: a norm before each sub-layer, SiLU, no window."""
    reasons = []
    if config.model_type not in PLAIN:
        reasons.append(f"its architecture is {config.model_type}")
    elif config.hidden_act != "silu":
        reasons.append(f"its activation is {config.hidden_act}")
    if getattr(config, "mlp_bias", False):
        reasons.append("its MLP has biases")
    if any(window_of(config, layer) for layer in range(config.num_hidden_layers)):
        reasons.append("it has layers with a sliding window")
    if reasons:
        raise FasaError(
            f"the decode loop does not know this model: {reasons[0]}",
            hint=f"{', '.join(PLAIN)} without sliding windows; or time it with --device cpu",
        )
