"""Attention in plain torch: dense for prompts, restricted to a method's tokens for decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.cache import EvalCache
from fasa_trt.evaluation.methods.base import Selector
from fasa_trt.evaluation.steps import Step

NAME = "fasa_evaluation"
BLOCK = 1024  # queries of a prompt at once, where there is a window or a soft-cap


@dataclass
class Traffic:
    """Bytes of keys, values and whatever a method reads to choose, over all decode steps; dense: what all would be."""

    read: float | Tensor = 0.0  # tensors: to look at one waits for the GPU
    dense: float | Tensor = 0.0

    @property
    def share(self) -> float:
        dense = float(self.dense)
        return float(self.read) / dense if dense else 1.0


@dataclass
class Pass:
    """One forward pass: T tokens for each row of the cache, rows of fewer tokens padded at their end.

    prompt: starts at column 0, attends densely. observe: the queries belong to the prompt. selectors: one a layer,
    None for a dense one. windows: of each layer, in tokens.
    """

    cache: EvalCache
    positions: Tensor
    counts: Tensor
    first: int
    windows: Sequence[int | None]
    selectors: Sequence[Selector | None]
    prompt: bool = False
    observe: bool = False
    traffic: Traffic = field(default_factory=Traffic)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
        """q [B, Hq, T, d], k, v [B, Hkv, T, d] after RoPE; returns [B, T, Hq, d]."""
        self.cache.write(layer, self.positions, k, v)
        if self.observe:
            self.cache.observe(layer, q, self.counts, scale)
        if self.prompt:
            return prompt_attention(q, k, v, scale, softcap, self.windows[layer]).transpose(1, 2)
        batch, heads, steps, head_dim = q.shape
        kv_heads = k.shape[1]
        step = Step(
            q=q.view(batch, kv_heads, heads // kv_heads, steps, head_dim),
            k=self.cache.keys[layer],
            positions=self.positions,
            valid=torch.arange(steps, device=q.device) < self.counts[:, None],
            first=self.first,
            scale=scale,
            softcap=softcap,
            window=self.windows[layer],
        )
        selector = self.selectors[layer]
        chosen = None if selector is None else selector.select(step)
        self._count(step, selector, chosen, 2 * head_dim * k.element_size())
        out = restricted_attention(step, chosen, self.cache.values[layer])
        return out.to(q.dtype).reshape(batch, heads, steps, head_dim).transpose(1, 2)

    def _count(self, step: Step, selector: Selector | None, chosen: Tensor | None, token_bytes: int) -> None:
        """Adds the bytes of a KV head, on average over them."""
        lengths = step.seen.sum(-1)[:, 0].float()  # [B, 1, T]
        dense = lengths * token_bytes
        read = dense
        if chosen is not None and selector is not None:
            tokens = (chosen & step.seen).any(2).sum(-1).float().mean(1, keepdim=True)
            read = tokens * token_bytes + selector.index_bytes(lengths, token_bytes)
        valid = step.valid[:, None]
        self.traffic.dense += (dense * valid).double().sum()
        self.traffic.read += (read * valid).double().sum()


def restricted_attention(step: Step, chosen: Tensor | None, values: Tensor) -> Tensor:
    """Exact attention over the chosen columns; chosen: bool, broadcastable to [B, Hkv, G, T, C], None for all.

    Returns float32 [B, Hkv, G, T, d].
    """
    logits = step.logits if chosen is None else step.logits.masked_fill(~chosen, -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    batch, kv_heads, group, steps, columns = weights.shape
    out = weights.view(batch, kv_heads, group * steps, columns) @ values.float()
    return out.view(batch, kv_heads, group, steps, -1)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int | None) -> Tensor:
    """Causal attention of a prompt with itself, [B, Hq, T, d] like q."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    length = q.shape[2]
    if not softcap and (window is None or window >= length):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        low = 0 if window is None else max(0, start - window + 1)
        age = torch.arange(start, end, device=q.device)[:, None] - torch.arange(low, end, device=q.device)
        hidden = (age < 0) if window is None else (age < 0) | (age >= window)
        logits = scale * (q[:, :, start:end].float() @ k[:, :, low:end].float().transpose(2, 3))
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
        blocks.append((weights @ v[:, :, low:end].float()).to(q.dtype))
    return torch.cat(blocks, dim=2)


def evaluation_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    evaluation: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Raises FasaError for a model that does not hand its arguments down."""
    if evaluation is None:
        raise FasaError(
            f"{type(module).__name__} does not pass arguments on to its attention: it cannot be evaluated",
            hint="use an architecture such as Llama, Mistral, Qwen, Phi-3 or Gemma",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return evaluation.attend(module.layer_idx, query, key, value, scale, float(softcap or 0.0)), None


AttentionInterface.register(NAME, evaluation_attention)
