"""Small random checkpoints of every supported architecture, made by transformers from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(12)],
    "long_factor": [1.0 + 0.5 * i for i in range(12)],
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
# name -> (model_type, what differs from BASE). Sliding windows are short enough to matter in the tests.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
            "hidden_size": 128,  # Phi-3 derives head_dim from it
            "sliding_window": None,
            "original_max_position_embeddings": 64,
        },
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "gemma2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 7, "final_logit_softcapping": 5.0},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    "glm": ("glm", {"partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "olmo2": ("olmo2", {}),
}


def make_model(variant: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a random float32 checkpoint of `variant` and returns its directory."""
    model_type, differences = VARIANTS[variant]
    config = CONFIG_MAPPING[model_type](**{**BASE, **differences, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # the initialiser leaves norms at 1 and logits near 0
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.15) + ("norm" in name))
    model.save_pretrained(directory)
    return directory
