"""How the supported decoder architectures differ: one table.

What a checkpoint says by itself needs no entry: biases, fused projections and q/k norms are recognised by their
tensors; RoPE, head counts, windows and multipliers by its config. See CONTRIBUTING.md, "Add an architecture".
"""

from __future__ import annotations

from dataclasses import dataclass

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError


@dataclass(frozen=True)
class Architecture:
    """Names of a decoder layer's norms, in the order in which a token meets them, and the norm's flavour.

    attention_norm, mlp_norm: before the sub-layer. after_attention_norm, after_mlp_norm: on its output, before the
    residual. norm_offset: added to every norm weight (Gemma stores weight - 1).
    """

    attention_norm: str | None = "input_layernorm"
    after_attention_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    after_mlp_norm: str | None = None
    norm_offset: float = 0.0


PRE_NORM = Architecture()
GEMMA = Architecture(
    after_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp_norm="post_feedforward_layernorm",
    norm_offset=1.0,
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "granite": PRE_NORM,
    "smollm3": PRE_NORM,
    "glm": PRE_NORM,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "glm4": Architecture(after_attention_norm="post_self_attn_layernorm", after_mlp_norm="post_mlp_layernorm"),
    "olmo2": Architecture(
        attention_norm=None,
        after_attention_norm="post_attention_layernorm",
        mlp_norm=None,
        after_mlp_norm="post_feedforward_layernorm",
    ),
}


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Raises FasaError for an architecture that the exporter does not know."""
    model_type = checkpoint.config.model_type
    if model_type not in ARCHITECTURES:
        raise FasaError(
            f"architecture {model_type!r} is not supported", hint=f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


@dataclass(frozen=True)
class Multipliers:
    """Scalars that some architectures put on activations; 1 or None where they do not."""

    embedding: float
    attention: float
    residual: float
    logits: float
    attention_softcap: float | None
    logits_softcap: float | None
    activation: str


def multipliers_of(checkpoint: Checkpoint) -> Multipliers:
    """Read off the config; upstream: the `modeling_*.py` of each architecture in transformers."""
    config = checkpoint.config
    gemma = config.model_type.startswith("gemma")
    scale = getattr(config, "attention_multiplier", None)  # Granite
    if scale is None:
        scale = getattr(config, "query_pre_attn_scalar", None) or checkpoint.head_dim  # Gemma, everybody else
        scale = float(scale) ** -0.5
    return Multipliers(
        embedding=float(config.hidden_size) ** 0.5 if gemma else float(getattr(config, "embedding_multiplier", 1.0)),
        attention=float(scale),
        residual=float(getattr(config, "residual_multiplier", 1.0)),
        logits=1.0 / float(getattr(config, "logits_scaling", 1.0)),
        # Gemma 3's config still has the field, its attention no longer applies it.
        attention_softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        activation=str(getattr(config, "hidden_activation", None) or config.hidden_act),
    )
