"""Models of the plugin lowering on the CPU: onnx's reference evaluator, with the attention node played by numpy over a
paged pool in host memory, fed as TensorRT-LLM's batch manager feeds an engine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from transformers import AutoModelForCausalLM

from fasa_trt.core import contract
from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.contract import EngineLimits
from fasa_trt.core.reference import attend, decode
from fasa_trt.core.rope import Rotary
from fasa_trt.core.spec import REDUCTION_CODES, SparseSpec
from fasa_trt.export.decoder import new_context
from fasa_trt.export.graph import PLUGIN_OPSET
from fasa_trt.export.onnx_model import write_onnx
from fasa_trt.export.plan import LayerPlan, plan_layers
from fasa_trt.export.plugin import NODE_BINDINGS, PluginAttention, build_plugin_model
from tests.engines import Planned, random_profile
from tests.models import VARIANTS, make_model

Array = NDArray[Any]
LIMITS = EngineLimits(max_batch_size=4, max_num_tokens=256, max_seq_len=128, tokens_per_block=8)
NAMES = ("q", "k", "v", "inv_freq", "rope_scale", *NODE_BINDINGS, "q_norm", "k_norm")


def overrides_of(variant: str, head_dim: int = 64) -> dict[str, Any]:
    """What makes `variant` a model that the kernels can execute: the size of its heads."""
    hidden = 4 * head_dim  # Phi-3 derives head_dim from it
    if variant == "phi3-longrope":
        chunks = head_dim * 3 // 8  # 3/4 of the head is rotated
        factors = {"short_factor": [1.0 + 0.01 * i for i in range(chunks)]}
        factors["long_factor"] = [1.0 + 0.5 * i for i in range(chunks)]
        rope = {**VARIANTS[variant][1]["rope_parameters"], **factors}
        return {"head_dim": head_dim, "hidden_size": hidden, "rope_parameters": rope}
    return {"head_dim": head_dim, **({"hidden_size": hidden} if variant.startswith("phi3") else {})}


class FasaAttention(OpRun):
    """The node; see `fasa_attention`."""

    op_domain = "ai.fasa"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array]:
        return (fasa_attention(self, dict(zip(NAMES, inputs, strict=False))),)


def fasa_attention(a: Any, x: dict[str, Array]) -> Array:
    """What `plugins/tensorrt` computes, [tokens, heads * head_dim]; prefix labels. a: the attributes."""
    dtype, group = x["q"].dtype, a.num_q_heads // a.num_kv_heads
    spec = SparseSpec(
        budget=a.budget,
        n_tip=a.n_tip,
        reduction={code: name for name, code in REDUCTION_CODES.items()}[a.reduction],  # type: ignore[arg-type]
        sink=a.sink,
        recent=a.recent,
    )
    q, k, v = (x[name].reshape(len(x[name]), -1, a.head_dim).astype(np.float64) for name in "qkv")
    if a.has_qk_norm:
        q, k = (_rms(y, x[f"{name}_norm"].astype(np.float64), a.norm_eps) for y, name in ((q, "q"), (k, "k")))
    out, start = np.empty_like(q), 0
    for s, length in enumerate(x["sequence_length"]):
        kind, chunk = int(x["host_request_types"][s]), int(x["context_lengths"][s])
        past = contract.past_length(kind, int(length), chunk)
        tokens = slice(start, start + int(length) - past)
        start = tokens.stop
        for g in range(a.num_kv_heads):
            rotary = Rotary(np.arange(a.head_dim).reshape(-1, 2), x["inv_freq"][g], x["rope_scale"][g])
            cos, sin = rotary.angles(np.arange(past, length))
            queries = _rotate(q[tokens, g * group : (g + 1) * group], cos[:, None], sin[:, None])
            keys = _cached(a, x, s, g, contract.KEYS, past, _rotate(k[tokens, g], cos, sin).astype(dtype))
            values = _cached(a, x, s, g, contract.VALUES, past, v[tokens, g].astype(dtype))
            for i, query in enumerate(queries):
                end = past + i + 1
                first = max(0, end - a.window) if a.window else 0
                row = query, keys[first:end], values[first:end]
                if a.n_tip and kind == contract.GENERATION:
                    result = decode(*row, np.arange(2 * a.n_tip), spec, a.scale, a.softcap)
                else:
                    result = attend(*row, a.scale, a.softcap)
                out[tokens.start + i, g * group : (g + 1) * group] = result
    assert start == len(q)
    result = out.reshape(len(q), -1).astype(dtype)
    assert isinstance(result, np.ndarray)
    return result


def _rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _cached(a: Any, x: dict[str, Array], s: int, g: int, kind: int, past: int, new: Array) -> Array:
    """Writes rows into the pool from slot `past` on, and reads all of them back, float64 [past + new, head_dim]."""
    pool, layer = (int(number) for number in x["host_kv_cache_pool_mapping"][a.layer_index])
    heads, size = a.num_kv_heads, a.tokens_per_block
    count = contract.block_bytes(size, heads, a.head_dim, new.itemsize)
    base = contract.layer_base(int(x["host_kv_cache_pool_pointers"][pool, 0]), layer, count)
    end = past + len(new)
    blocks = []
    for column in range(-(-end // size)):
        offset = int(x["kv_cache_block_offsets"][pool, s, kind, column])
        assert not contract.in_secondary_pool(offset)
        memory = (ctypes.c_uint8 * count).from_address(contract.block_address(base, offset, count))
        block = np.ctypeslib.as_array(memory).view(new.dtype).reshape(heads, size, a.head_dim)[g]
        first, last = max(past, column * size), min(end, (column + 1) * size)
        if first < last:
            block[first - column * size : last - column * size] = new[first - past : last - past]
        blocks.append(block)
    return np.concatenate(blocks)[:end].astype(np.float64)


@dataclass
class Request:
    """A request: the blocks that it owns and how far it is."""

    blocks: list[int]
    prompt: int
    length: int = 0


@dataclass
class PackedEngine:
    """Feeds a model's bindings; every sequence owns shuffled blocks for `LIMITS.max_seq_len` tokens."""

    path: Path
    checkpoint: Checkpoint
    layers: list[LayerPlan]
    dtype: str = "float32"
    sequences: dict[int, Request] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.evaluator = ReferenceEvaluator(str(self.path), new_ops=[FasaAttention])
        c, count = self.checkpoint, LIMITS.max_batch_size * LIMITS.max_blocks
        shape = (count, c.num_layers, 2, c.num_kv_heads, LIMITS.tokens_per_block, c.head_dim)
        self.pool = np.full(shape, np.nan, self.dtype)  # nothing may be read that was not written
        self.free = [int(block) for block in np.random.default_rng(0).permutation(count)]

    def join(self, name: int, prompt: int) -> None:
        self.sequences[name] = Request([self.free.pop() for _ in range(LIMITS.max_blocks)], prompt)

    def step(self, work: Sequence[tuple[int, Array]]) -> Array:
        """Feeds the next tokens of some sequences, those within their prompts first; logits [len(work), vocab]."""
        seqs = [self.sequences[name] for name, _ in work]
        kinds = [contract.CONTEXT if seq.length < seq.prompt else contract.GENERATION for seq in seqs]
        assert kinds == sorted(kinds)
        counts = [len(tokens) for _, tokens in work]
        offsets = np.full((1, len(work), 2, LIMITS.max_blocks), -(1 << 30), np.int32)  # stale: never to be followed
        for s, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
            assert seq.length + count <= seq.prompt or (seq.length >= seq.prompt and count == 1)
            seq.length += count
            for column, block in enumerate(seq.blocks[: -(-seq.length // LIMITS.tokens_per_block)]):
                for kind in (contract.KEYS, contract.VALUES):
                    offsets[0, s, kind, column] = contract.block_offset(block, kind, self.checkpoint.num_layers)
        lengths = np.array([seq.length for seq in seqs], np.int32)
        of_context = [kind == contract.CONTEXT for kind in kinds]
        context = np.where(of_context, counts, [seq.prompt for seq in seqs]).astype(np.int32)
        layers = np.arange(self.checkpoint.num_layers, dtype=np.int32)
        feeds = {
            "input_ids": np.concatenate([tokens for _, tokens in work]).astype(np.int32),
            "last_token_ids": np.cumsum(counts).astype(np.int32),
            "context_lengths": context,
            "host_context_lengths": context,
            "sequence_length": lengths,
            "host_past_key_value_lengths": np.where(of_context, lengths, lengths - 1).astype(np.int32),
            "host_request_types": np.array(kinds, np.int32),
            "kv_cache_block_offsets": offsets,
            "host_kv_cache_pool_pointers": np.array([[self.pool.ctypes.data, 0]], np.int64),
            "host_kv_cache_pool_mapping": np.stack([0 * layers, layers], axis=1),
        }
        logits: Array = self.evaluator.run(None, feeds)[0]  # type: ignore[index]
        return logits


@dataclass
class Made(Planned):
    """The same as a plugin engine. `tests.engines.reference_steps` takes it."""

    engine: PackedEngine


def make_engine(variant: str, work: Path, spec: SparseSpec, **overrides: Any) -> Made:
    """In float32, which the kernels do not have, so that the lowering can be compared closely."""
    directory = make_model(variant, work / "checkpoint", **{**overrides_of(variant), **overrides})
    checkpoint = open_checkpoint(directory)
    spec = spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=LIMITS.max_seq_len)
    layers = plan_layers(checkpoint, random_profile(checkpoint), spec, max_seq_len=LIMITS.max_seq_len)
    context = new_context(checkpoint, "float32", PLUGIN_OPSET)
    path = work / "plugin.onnx"
    write_onnx(build_plugin_model(context, PluginAttention(context, spec, LIMITS, layers), layers), path)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    return Made(checkpoint, layers, spec, model, PackedEngine(path, checkpoint, layers))
