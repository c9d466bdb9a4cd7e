"""The model as it is trained: a Llama whose parameters have the names that transformers gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.train_tiny.corpus import BOS, EOS
from examples.train_tiny.settings import Shape
from fasa_trt.core.atomic import write_bytes

Rope: TypeAlias = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Float32 parameters; computes in the dtype of its input, norms and RoPE in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, mlp = shape.hidden, shape.mlp
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_layernorm = nn.RMSNorm(hidden, eps=shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=shape.eps)
        self.self_attn = _linears(
            q_proj=(hidden, queries), k_proj=(hidden, keys), v_proj=(hidden, keys), o_proj=(queries, hidden)
        )
        self.mlp = _linears(gate_proj=(hidden, mlp), up_proj=(hidden, mlp), down_proj=(mlp, hidden))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, length, hidden]; cos, sin: float32 [length, 1, head_dim / 2]."""
        x = x + self._attention(_norm(self.input_layernorm, x), cos, sin)
        h = _norm(self.post_attention_layernorm, x)
        gate, up = (F.linear(h, self._weight("mlp", name, h.dtype)) for name in ("gate_proj", "up_proj"))
        return x + F.linear(F.silu(gate) * up, self._weight("mlp", "down_proj", h.dtype))

    def _attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, (batch, length, _) = self.shape, h.shape
        heads, kv_heads = shape.heads, shape.kv_heads
        weight = torch.cat([self._weight("self_attn", name, h.dtype) for name in ("q_proj", "k_proj", "v_proj")])
        qkv = F.linear(h, weight).view(batch, length, heads + 2 * kv_heads, shape.head_dim)
        a, b = qkv[:, :, : heads + kv_heads].float().chunk(2, dim=-1)
        qk = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(h.dtype).transpose(1, 2)
        v = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        out = F.scaled_dot_product_attention(qk[:, :heads], qk[:, heads:], v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).reshape(batch, length, heads * shape.head_dim)
        return F.linear(out, self._weight("self_attn", "o_proj", h.dtype))

    def _weight(self, group: str, name: str, dtype: torch.dtype) -> Tensor:
        return self.get_submodule(f"{group}.{name}").get_parameter("weight").to(dtype)


def run_block(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One block as a function: compiled once, it serves every layer."""
    return block(x, cos, sin)


class TinyLlama(nn.Module):
    """Token ids [batch, length] -> hidden states [batch, length, hidden] of type `dtype`, before the last norm."""

    def __init__(self, shape: Shape | None = None, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.run_block: Callable[..., Tensor] = run_block
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.layers) if residual else 1))

    def forward(self, tokens: Tensor, rope: Rope) -> Tensor:
        x = self.embed_tokens(tokens).to(self.dtype)
        for layer in self.layers:
            x = self.run_block(layer, x, *rope)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return logits(hidden, self.norm.weight, self.embed_tokens.weight)

    def rope(self, length: int) -> Rope:
        """cos, sin: float32 [length, 1, head_dim / 2], on the model's device."""
        shape = self.shape
        inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse[None]
        device = self.norm.weight.device
        return angles.cos().to(device)[:, None, :], angles.sin().to(device)[:, None, :]


def logits(hidden: Tensor, norm: Tensor, embedding: Tensor) -> Tensor:
    h = F.rms_norm(hidden.float(), (hidden.shape[-1],), norm, 1e-5).to(hidden.dtype)
    return F.linear(h, embedding.to(hidden.dtype))


class Losses(NamedTuple):
    """loss: weighted. text, answer: mean cross-entropy of each. right, asked: answer tokens of each row."""

    loss: Tensor
    text: Tensor
    answer: Tensor
    right: Tensor
    asked: Tensor


def losses(
    hidden: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, text: Tensor, answers: Tensor
) -> Losses:
    """targets, weights, text and answers (masks): [batch, length]. Scores are float32: 0.5 GiB for 65536 tokens of
    2048 entries, so they are held at once."""
    scores = logits(hidden, norm, embedding).float()
    entropy = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    plain, answer = text.float(), answers.float()
    seen, hit = entropy.detach(), (scores.detach().argmax(-1) == targets).float()
    return Losses(
        (entropy * weights).sum() / weights.sum(),
        (seen * plain).sum() / plain.sum().clamp(min=1),
        (seen * answer).sum() / answer.sum().clamp(min=1),
        (hit * answer).sum(1),
        answer.sum(1),
    )


def save_checkpoint(model: TinyLlama, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) for transformers.

    Each file replaces an older one as a whole. Raises FasaError when it cannot be written.
    """
    from safetensors.torch import save
    from transformers import LlamaConfig

    shape = model.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        rms_norm_eps=shape.eps,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ).to_dict()
    # Both spellings of RoPE and dtype, so that transformers 4 and 5 and other readers understand it.
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    config |= {"rope_parameters": rope, "rope_theta": shape.rope_theta, "rope_scaling": None}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config.pop("pad_token_id", None)
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    for name, content in (("config", config), ("generation_config", generation)):
        write_bytes(folder / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())
    weights = {
        f"model.{name}": value.detach().to(torch.bfloat16).contiguous().cpu()
        for name, value in model.state_dict().items()
    }
    write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def _linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(i, o, bias=False) for name, (i, o) in sizes.items()})


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight, norm.eps).to(x.dtype)
