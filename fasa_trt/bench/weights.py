"""The weights of the decode loop: fused projections, head dims in baked order, random or a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasa_trt.bench.shapes import check_config
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import head_dim_of, rotary_of

STD = 0.02  # of random weights, transformers' own

Get = Callable[[str, tuple[int, ...]], Tensor]
"""A checkpoint's tensor, by its name and expected shape."""


@dataclass(frozen=True)
class LayerWeights:
    """qkv: [(Hq + 2 Hkv) * head_dim, hidden], query heads, key heads, value heads. gate_up: [2 * intermediate,
    hidden]. q_norm, k_norm: [Hq, head_dim], [Hkv, head_dim] or None. Biases: of their projection's rows, or None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Weights:
    """inv_freq, rope_scale: float32 [Hkv, head_dim / 2], as the append kernel takes them."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor
    inv_freq: Tensor
    rope_scale: Tensor

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that a decode step reads of them: all but the embedding, of which it reads a row."""
        every = [self.norm, self.lm_head]
        for layer in self.layers:
            every += [tensor for tensor in vars(layer).values() if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in every)


def random_weights(config: Any, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Drawn on the device; times do not depend on them. Raises FasaError when they do not fit into its memory."""
    generator = torch.Generator(device).manual_seed(seed)

    def get(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device, dtype=dtype)
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, STD, generator=generator)

    has_bias = bool(getattr(config, "attention_bias", False))
    biases = {"qwen2": (True, False)}.get(config.model_type, (has_bias, has_bias))
    try:
        return _weights(config, get, biases, qk_norm=config.model_type == "qwen3", device=device)
    except torch.OutOfMemoryError:
        raise FasaError("the weights do not fit into the GPU's memory", hint="a smaller --shape") from None


def checkpoint_weights(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Weights:
    """Raises FasaError for a model that the loop does not compute, or a checkpoint that is not of its config."""

    def get(name: str, shape: tuple[int, ...]) -> Tensor:
        stored = checkpoint.tensor(name)
        if tuple(stored.shape) != shape:
            raise FasaError(f"{name} is {tuple(stored.shape)}, config.json asks for {shape}")
        # numpy has no bfloat16 that torch takes: by way of float32
        return torch.from_numpy(stored.read().astype(np.float32)).to(device=device, dtype=dtype)

    attention = "model.layers.0.self_attn."
    known = checkpoint.tensors
    biases = (f"{attention}q_proj.bias" in known, f"{attention}o_proj.bias" in known)
    return _weights(checkpoint.config, get, biases, qk_norm=f"{attention}q_norm.weight" in known, device=device)


def _weights(config: Any, get: Get, biases: tuple[bool, bool], *, qk_norm: bool, device: torch.device) -> Weights:
    check_config(config)
    rotary = rotary_of(config, 0, max_seq_len=int(config.max_position_embeddings))
    assert rotary is not None
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    dims = torch.from_numpy(rotary.pairs.reshape(-1)).to(device)  # pair members side by side

    def permuted(tensor: Tensor) -> Tensor:
        """Rows of queries or keys in baked order."""
        return tensor.unflatten(0, (-1, head_dim)).index_select(1, dims).flatten(0, 1)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}

        def qkv(kind: str, *rest: int) -> Tensor:
            q, k, v = (get(f"{attention}{name}_proj.{kind}", (count, *rest)) for name, count in rows.items())
            return torch.cat([permuted(q), permuted(k), v])

        def head_norm(name: str, count: int) -> Tensor | None:
            if not qk_norm:
                return None
            return get(f"{attention}{name}.weight", (head_dim,))[dims].expand(count, head_dim).contiguous()

        return LayerWeights(
            input_norm=get(f"{prefix}input_layernorm.weight", (hidden,)),
            qkv=qkv("weight", hidden),
            qkv_bias=qkv("bias") if biases[0] else None,
            q_norm=head_norm("q_norm", heads),
            k_norm=head_norm("k_norm", kv_heads),
            o=get(f"{attention}o_proj.weight", (hidden, heads * head_dim)),
            o_bias=get(f"{attention}o_proj.bias", (hidden,)) if biases[1] else None,
            post_norm=get(f"{prefix}post_attention_layernorm.weight", (hidden,)),
            gate_up=torch.cat([get(f"{mlp}{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")]),
            down=get(f"{mlp}down_proj.weight", (hidden, inner)),
        )

    embedding = get("model.embed_tokens.weight", (config.vocab_size, hidden))
    tables = (rotary.inv_freq, rotary.scale)
    inv_freq, rope_scale = (torch.from_numpy(table).to(device).expand(kv_heads, -1).contiguous() for table in tables)
    return Weights(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=float(config.rms_norm_eps),
        embedding=embedding,
        layers=[layer(index) for index in range(config.num_hidden_layers)],
        norm=get("model.norm.weight", (hidden,)),
        lm_head=embedding if config.tie_word_embeddings else get("lm_head.weight", (config.vocab_size, hidden)),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )
