"""Checkpoints of real models' shapes with random weights, written as fast as the disk takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

SHARD_BYTES = 4_700_000_000  # about what published checkpoints use
BLOCK_ELEMENTS = (32 << 20) + 1009  # random numbers are drawn once; tensors begin at different places of the block
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield f"{prefix}self_attn.q_proj.weight", (query, self.hidden)
            yield f"{prefix}self_attn.k_proj.weight", (key, self.hidden)
            yield f"{prefix}self_attn.v_proj.weight", (key, self.hidden)
            yield f"{prefix}self_attn.o_proj.weight", (self.hidden, query)
            yield f"{prefix}mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{prefix}input_layernorm.weight", (self.hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def nbytes(self) -> int:
        """Of all weights in bfloat16."""
        return sum(_nbytes(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, object]:
        """The content of config.json."""
        llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **llama3},
            "dtype": "bfloat16",
        }


SHAPES = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "small": Shape(256, 768, 6, 8, 2, 128, 2048, tied=True),
}


def write_checkpoint(
    shape: Shape,
    directory: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes config.json, bfloat16 shards of about `shard_bytes` and their index; returns the shards.

    Needs the memory of one block of random numbers, whatever the shape. The shards are on the disk when it returns.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", "utf-8")
    block = memoryview(_random_block(seed))
    shards = _shards(shape, shard_bytes)
    weight_map: dict[str, str] = {}
    files: list[Path] = []
    done = 0
    for number, tensors in enumerate(shards, start=1):
        file = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        files.append(file)
        with file.open("wb") as stream:
            stream.write(_header(tensors))
            for index, (name, dims) in enumerate(tensors):
                weight_map[name] = file.name
                left, start = _nbytes(dims), 2 * ((index * 1_000_003) % BLOCK_ELEMENTS)
                while left:
                    piece = block[start : start + left]
                    stream.write(piece)
                    left, start, done = left - len(piece), 0, done + len(piece)
                    if progress is not None:
                        progress(done, shape.nbytes)
            stream.flush()
            os.fsync(stream.fileno())
    index_file = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n", "utf-8")
    return files


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape, dtype=np.int64))


def _random_block(seed: int) -> bytes:
    """BLOCK_ELEMENTS bfloat16 weights as a fresh model has them."""
    block = np.random.default_rng(seed).standard_normal(BLOCK_ELEMENTS, np.float32)
    return (block * np.float32(0.02)).astype(ml_dtypes.bfloat16).tobytes()


def _shards(shape: Shape, limit: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in their order, a new shard wherever the next would exceed the limit."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in shape.tensors():
        if shards[-1] and size + _nbytes(dims) > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += _nbytes(dims)
    return shards


def _header(tensors: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON, padded so that the data begins at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors:
        entries[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + _nbytes(dims)]}
        offset += _nbytes(dims)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
