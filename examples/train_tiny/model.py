"""The model as it is trained: a Llama whose parameters have the names that transformers gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.train_tiny.corpus import BOS, EOS

Rope: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    vocab: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    mlp: int = 768
    rope_theta: float = 500_000.0
    eps: float = 1e-5
    max_positions: int = 16384


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
        gate, up = (F.linear(h, self._weight("mlp", name)) for name in ("gate_proj", "up_proj"))
        return x + F.linear(F.silu(gate) * up, self._weight("mlp", "down_proj"))

    def _attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, (batch, length, _) = self.shape, h.shape
        heads, kv_heads = shape.heads, shape.kv_heads
        weight = torch.cat([self._weight("self_attn", name) for name in ("q_proj", "k_proj", "v_proj")])
        qkv = F.linear(h, weight.to(h.dtype)).view(batch, length, heads + 2 * kv_heads, shape.head_dim)
        a, b = qkv[:, :, : heads + kv_heads].float().chunk(2, dim=-1)
        qk = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(h.dtype).transpose(1, 2)
        v = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        out = F.scaled_dot_product_attention(qk[:, :heads], qk[:, heads:], v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).reshape(batch, length, heads * shape.head_dim)
        return F.linear(out, self._weight("self_attn", "o_proj"))

    def _weight(self, group: str, name: str) -> Tensor:
        return self.get_submodule(f"{group}.{name}").get_parameter("weight").to(torch.bfloat16)


def run_block(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One block as a function: compiled once, it serves every layer."""
    return block(x, cos, sin)


class TinyLlama(nn.Module):
    """Token ids [batch, length] -> bfloat16 hidden states [batch, length, hidden], before the last norm."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.run_block: Callable[..., Tensor] = run_block
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.layers) if residual else 1))

    def forward(self, tokens: Tensor, rope: Rope) -> Tensor:
        x = self.embed_tokens(tokens).to(torch.bfloat16)
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
    h = F.rms_norm(hidden.float(), (hidden.shape[-1],), norm, 1e-5).to(torch.bfloat16)
    return F.linear(h, embedding.to(torch.bfloat16))


def losses(
    hidden: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss, and for the log the plain code's and the answers' mean cross-entropy.

    targets, weights, answers: [batch, length].
    """
    scores = logits(hidden, norm, embedding).float().flatten(0, 1)
    entropy = F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)
    code, answer = (weights == 1).float(), (answers > 0).float()
    seen = entropy.detach()
    return (
        (entropy * weights).sum() / weights.sum(),
        (seen * code).sum() / code.sum(),
        (seen * answer).sum() / answer.sum().clamp(min=1),
    )


def save_checkpoint(model: TinyLlama, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) for transformers."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    shape = model.shape
    LlamaConfig(
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
    ).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # Both spellings of RoPE and dtype, so that transformers 4 and 5 and other readers understand it.
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    config |= {"rope_parameters": rope, "rope_theta": shape.rope_theta, "rope_scaling": None}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config.pop("pad_token_id", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    weights = {
        f"model.{name}": value.detach().to(torch.bfloat16).contiguous().cpu()
        for name, value in model.state_dict().items()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(i, o, bias=False) for name, (i, o) in sizes.items()})


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight, norm.eps).to(x.dtype)
