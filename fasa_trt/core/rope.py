"""Rotary position embedding as data: which dims form a frequency chunk, and how fast each chunk turns.

A *frequency chunk* (FC) is the pair of head dims that RoPE rotates together. Everything downstream (calibration,
baking, kernels) speaks of FCs by their index in `Rotary.pairs`, whatever pairing style the checkpoint uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError

# Model types whose attention rotates neighbouring dims (2i, 2i+1). All others that transformers ships and this
# project supports rotate halves (i, i + rotary_dim/2).
INTERLEAVED = frozenset({"glm", "glm4", "cohere", "cohere2", "ernie4_5", "gptj", "helium"})


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one attention layer with `head_dim` = 2 F.

    pairs: int64 [F, 2], the two head dims of each FC; dims that are not rotated come last, paired with neighbours.
    inv_freq: float32 [F], radians per position; 0 for unrotated pairs.
    scale: float32 [F], factor on cos and sin ("attention scaling" of YaRN and LongRoPE); 1 for unrotated pairs.
    """

    pairs: NDArray[np.int64]
    inv_freq: NDArray[np.float32]
    scale: NDArray[np.float32]

    @property
    def num_chunks(self) -> int:
        return len(self.pairs)

    def angles(self, positions: NDArray[np.integer[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin, float32 [..., F], for integer `positions` [...]."""
        angle = positions.astype(np.float32)[..., None] * self.inv_freq
        return np.cos(angle) * self.scale, np.sin(angle) * self.scale


def chunk_pairs(head_dim: int, rotary_dim: int, *, interleaved: bool) -> NDArray[np.int64]:
    """The dims of each FC, int64 [head_dim/2, 2]: the rotated pairs in order of frequency, then the unrotated ones."""
    i = np.arange(rotary_dim // 2)
    rotated = np.stack([2 * i, 2 * i + 1] if interleaved else [i, i + rotary_dim // 2], axis=1)
    return np.concatenate([rotated, np.arange(rotary_dim, head_dim).reshape(-1, 2)]).astype(np.int64)


def head_dim_of(config: Any) -> int:
    """Dims of one attention head, for a transformers config that may leave it implicit."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_type(config: Any, layer: int) -> str:
    """`"full_attention"` or `"sliding_attention"`, as transformers names it."""
    types = getattr(config, "layer_types", None)
    if types:
        return str(types[layer])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def window_of(config: Any, layer: int) -> int | None:
    """Tokens that `layer` may look back on, itself included; None for all of them."""
    return int(config.sliding_window) if layer_type(config, layer) == "sliding_attention" else None


def rotary_of(config: Any, layer: int, *, max_seq_len: int | None = None) -> Rotary | None:
    """The rotary embedding of `layer` in a transformers `config`; None for a layer without RoPE (NoPE).

    Frequencies come from transformers' own `ROPE_INIT_FUNCTIONS`, so every `rope_type` that it knows is covered.
    The types that depend on the sequence's length ("dynamic", "longrope") are resolved once, for `max_seq_len`
    (default: the length the model was trained for), as an engine has one table for all its steps.

    Raises FasaError when the model has no rotary embedding at all.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise FasaError(
            f"{config.model_type} has no rotary position embedding: FASA needs RoPE frequency chunks",
            hint="use a RoPE model such as Llama, Mistral, Qwen, Phi-3 or Gemma",
        )
    without = getattr(config, "no_rope_layers", None)  # despite its name, 1 marks a layer that does rotate
    if without and not without[layer]:
        return None
    kind: str | None = None
    if "rope_type" not in parameters:  # one set of parameters per layer type (Gemma 3)
        kind = layer_type(config, layer)
        parameters = parameters[kind]
    head_dim = head_dim_of(config)
    rotary_dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    pairs = chunk_pairs(head_dim, rotary_dim, interleaved=config.model_type in INTERLEAVED)
    inv_freq, scaling = _frequencies(config, parameters, kind, rotary_dim, max_seq_len)
    rest = head_dim // 2 - len(inv_freq)
    return Rotary(
        pairs=pairs,
        inv_freq=np.pad(inv_freq, (0, rest)),
        scale=np.pad(np.full(len(inv_freq), scaling, np.float32), (0, rest), constant_values=1.0),
    )


def _frequencies(
    config: Any, parameters: dict[str, Any], kind: str | None, rotary_dim: int, max_seq_len: int | None
) -> tuple[NDArray[np.float32], float]:
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
        return (1.0 / np.float32(parameters["rope_theta"]) ** exponent).astype(np.float32), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in ROPE_INIT_FUNCTIONS:
        raise FasaError(
            f"rope_type {rope_type!r} is not one that the installed transformers knows",
            hint=f"known types: default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}",
        )
    keywords = {} if kind is None else {"layer_type": kind}
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=max_seq_len, **keywords)
    return inv_freq.float().numpy(), float(scaling)
