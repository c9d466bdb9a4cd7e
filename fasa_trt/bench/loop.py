"""One decode step of a Llama-like model in as few kernels as torch allows, for CUDA graphs.

Both sides of a comparison run this loop, with the same weights; they differ in the attention they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from fasa_trt.bench.caches import CachedAttention
from fasa_trt.bench.weights import Weights

Linear = Callable[[Tensor, Tensor], Tensor]
PROJECTIONS = ("qkv", "o", "gate_up", "down", "lm_head")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers' LlamaRMSNorm: normalised in float32, rounded, then scaled."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual with `delta` added, and that normalised."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [batch, 2 * intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


class DecodeLoop:
    """Decodes greedily, a token a sequence and step.

    tokens: int64 [batch], fed next and replaced by the step. logits: [batch, vocab] of the last step.
    linears: how each projection is multiplied, where it has no bias; `torch.nn.functional.linear` for those not named.
    """

    logits: Tensor

    def __init__(
        self, weights: Weights, attention: CachedAttention, tokens: Tensor, *, linears: dict[str, Linear] | None = None
    ) -> None:
        self.weights, self.attention, self.tokens = weights, attention, tokens
        self.linears: dict[str, Linear] = {**dict.fromkeys(PROJECTIONS, linear), **(linears or {})}
        self.rms_norm, self.add_norm, self.gated = small_operators(weights.device)

    @torch.no_grad()
    def step(self) -> None:
        """Only launches: no synchronisation, no host data, so it can be captured into a CUDA graph."""
        weights, eps, linears = self.weights, self.weights.eps, self.linears
        x = embedding(self.tokens, weights.embedding)
        h = self.rms_norm(x, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            qkv = linears["qkv"](h, layer.qkv) if layer.qkv_bias is None else linear(h, layer.qkv, layer.qkv_bias)
            attended = self.attention(index, *self._heads(qkv)).flatten(1)
            o = linears["o"](attended, layer.o) if layer.o_bias is None else linear(attended, layer.o, layer.o_bias)
            x, h = self.add_norm(x, o, layer.post_norm, eps)
            mlp = linears["down"](self.gated(linears["gate_up"](h, layer.gate_up)), layer.down)
            last = index + 1 == len(weights.layers)
            x, h = self.add_norm(x, mlp, weights.norm if last else weights.layers[index + 1].input_norm, eps)
        self.logits = linears["lm_head"](h, weights.lm_head)
        self.tokens.copy_(self.logits.argmax(dim=-1))
        self.attention.place.advance()

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [batch, heads, head_dim] of a fused projection."""
        counts = [self.weights.heads, self.weights.kv_heads, self.weights.kv_heads]
        q, k, v = qkv.unflatten(1, (-1, self.weights.head_dim)).split(counts, dim=1)
        return q, k, v


def small_operators(device: torch.device) -> tuple[Any, Any, Any]:
    """rms_norm, add_norm and gated: on a GPU compiled to a kernel each, elsewhere as they are."""
    plain = (rms_norm, add_norm, gated)
    if device.type != "cuda":
        return plain
    return tuple(compiled(operator) for operator in plain)  # type: ignore[return-value]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` compiled by torch, a kernel for each shape. options: Inductor's."""
    if hasattr(torch._dynamo.config, "recompile_limit"):
        torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, options=options or None)
