"""A scripted stretch of in-flight batching through the plugin: sequences join, are prefilled in chunks, decode and
leave, in blocks that are shuffled and reused. What each step should give is computed in float64 beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.reference import Array, attend, importance, select
from tests.plugins.tensorrt.driver import BF16, HALF, RUNTIME, Driver, Layer, Plugin
from tests.plugins.tensorrt.layers import tensors

MAPPING = ((0, 0), (1, 1), (0, 1))  # pool of each layer, and which layer of the pool it is
LAYERS_OF_POOL, MAX_BLOCKS, WILD = 2, 32, 0x7FFFFFF
CLEAR = 1e-3  # scores that are this much closer, of the largest, may be chosen in either order
# Steps: tokens of each context sequence, then the generating ones.
STEPS: Sequence[tuple[Mapping[str, int], str]] = (
    ({"a": 40, "b": 7}, ""),
    ({"c": 64}, "ab"),
    ({"d": 100}, "cab"),
    ({"d": 70}, "bca"),
    ({"e": 1, "f": 33}, "adc"),  # b has left, its blocks go to those that come
    ({}, "fdeac"),
    ({"f": 31}, "ed"),  # a chunk after an answer: the next turn of a conversation
    ({}, "fedac"),
)
LEAVE = {4: "b"}  # before the step


@dataclass
class Cached:
    """What one sequence has cached, by layer: keys after rotation and values, float64 [length, kv_heads, head_dim]."""

    length: int = 0
    blocks: list[list[int]] = field(default_factory=lambda: [[], []])  # of each pool
    k: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)


class Serving:
    """The runtime's part: pools, blocks and bindings."""

    def __init__(self, driver: Driver, layers: Sequence[Layer], dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device, self.layers = dtype, device, layers
        self.heads, self.kv_heads, self.head_dim, self.tokens = (
            int(layers[0][name]) for name in ("num_q_heads", "num_kv_heads", "head_dim", "tokens_per_block")
        )
        self.kind = BF16 if dtype == torch.bfloat16 else HALF
        shape = (40, LAYERS_OF_POOL, 2, self.kv_heads, self.tokens, self.head_dim)
        self.pools = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2)]
        self.free = [random.Random(pool).sample(range(40), 40) for pool in range(2)]
        self.choices: list[bool] = []  # of budget tokens: whether clear
        self.sequences: dict[str, Cached] = {}
        generator = np.random.default_rng(0)
        half = self.head_dim // 2
        self.inv_freq = np.exp(-generator.uniform(0, 8, (self.kv_heads, half))).astype(np.float32)
        self.rope_scale = generator.uniform(0.8, 1.2, (self.kv_heads, half)).astype(np.float32)
        self.generator = torch.Generator().manual_seed(1)
        self.plugins = [self._plugin(driver, index, layer) for index, layer in enumerate(layers)]

    def _plugin(self, driver: Driver, index: int, layer: Layer) -> Plugin:
        plugin = driver.create({**layer, "layer_index": index, "num_layers": LAYERS_OF_POOL}, RUNTIME)
        assert plugin is not None
        return plugin.attach()

    def leave(self, name: str) -> None:
        for pool, blocks in enumerate(self.sequences.pop(name).blocks):
            self.free[pool] += blocks
            self.pools[pool][blocks] = float("nan")

    def step(self, contexts: Mapping[str, int], generating: str) -> None:
        """Runs all layers, and compares what they give."""
        names, counts = [*contexts, *generating], [*contexts.values(), *[1] * len(generating)]
        for name, count in zip(names, counts, strict=True):
            self._grow(self.sequences.setdefault(name, Cached()), count)
        bindings = self._bindings(names, counts, len(contexts))
        for index in range(len(self.layers)):
            self._run(index, names, counts, len(contexts), bindings)

    def _grow(self, sequence: Cached, count: int) -> None:
        sequence.length += count
        for pool in range(2):
            while len(sequence.blocks[pool]) * self.tokens < sequence.length:
                sequence.blocks[pool].append(self.free[pool].pop(0))

    def _bindings(self, names: Sequence[str], counts: Sequence[int], contexts: int) -> list[Tensor]:
        """From sequence_length on, in the plugin's order."""
        offsets = torch.full((2, len(names), 2, MAX_BLOCKS), WILD, dtype=torch.int32)
        for row, name in enumerate(names):
            for pool, blocks in enumerate(self.sequences[name].blocks):
                first = torch.tensor(blocks, dtype=torch.int32) * LAYERS_OF_POOL * 2
                offsets[pool, row, 0, : len(blocks)], offsets[pool, row, 1, : len(blocks)] = first, first + 1
        lengths = [self.sequences[name].length for name in names]
        context = [*counts[:contexts], *[5] * (len(names) - contexts)]
        past = [*lengths[:contexts], *(length - 1 for length in lengths[contexts:])]
        types = [0] * contexts + [1] * (len(names) - contexts)
        ints = [torch.tensor(values, dtype=torch.int32) for values in (lengths, context, context, types, past)]
        pointers = torch.tensor([[pool.data_ptr(), 0] for pool in self.pools])
        mapping = torch.tensor(MAPPING, dtype=torch.int32)
        return [*(x.to(self.device) for x in ints[:2]), *ints[2:], offsets.to(self.device), pointers, mapping]

    def _run(
        self, index: int, names: Sequence[str], counts: Sequence[int], contexts: int, bindings: Sequence[Tensor]
    ) -> None:
        layer, plugin, total = self.layers[index], self.plugins[index], sum(counts)
        q, k, v = (
            torch.randn(total, heads, self.head_dim, generator=self.generator).to(self.dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        tables = [torch.from_numpy(table) for table in (self.inv_freq, self.rope_scale)]
        norms = []
        if layer["has_qk_norm"]:
            norms = [
                (1 + 0.3 * torch.randn(heads, self.head_dim, generator=self.generator)).to(self.dtype)
                for heads in (self.heads, self.kv_heads)
            ]
        inputs = [x.to(self.device) for x in (q, k, v, *tables)] + [*bindings] + [x.to(self.device) for x in norms]
        given = tensors(
            layer, tokens=total, seqs=len(names), pools=2, max_blocks=MAX_BLOCKS, layers=len(MAPPING), dtype=self.kind
        )
        out = torch.full((total, self.heads, self.head_dim), float("nan"), dtype=self.dtype, device=self.device)
        workspace = torch.empty(plugin.call("workspace", given), dtype=torch.uint8, device=self.device)
        assert plugin.call("change_shapes", given) == 0
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        pointers = [x.data_ptr() for x in inputs]
        assert plugin.enqueue(given, pointers, out.data_ptr(), workspace.data_ptr(), stream) == 0
        got, first = out.double().cpu().numpy(), 0
        for row, (name, count) in enumerate(zip(names, counts, strict=True)):
            mine = slice(first, first + count)
            wanted = self._expected(index, name, q[mine], k[mine], v[mine], norms, generates=row >= contexts)
            known = ~np.isnan(wanted)
            error = np.abs(got[mine] - wanted)[known].max() / np.abs(wanted[known]).max()
            assert np.isfinite(got[mine]).all()
            assert error < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[self.dtype], (index, name, error)
            first += count

    def _expected(
        self, index: int, name: str, q: Tensor, k: Tensor, v: Tensor, norms: Sequence[Tensor], *, generates: bool
    ) -> Array:
        layer, sequence = self.layers[index], self.sequences[name]
        past, group = sequence.length - len(q), self.heads // self.kv_heads
        weights: list[Tensor | None] = [*norms] or [None, None]
        queries = self._rotated(q, weights[0], past, float(layer["norm_eps"]))
        keys, values = self._rotated(k, weights[1], past, float(layer["norm_eps"])), v.double().numpy()
        if len(sequence.k) <= index:
            sequence.k.append(keys[:0])
            sequence.v.append(values[:0])
        sequence.k[index] = np.concatenate([sequence.k[index], keys])
        sequence.v[index] = np.concatenate([sequence.v[index], values])
        scale, window, n_tip = float(layer["scale"]), int(layer["window"]), int(layer["n_tip"])
        out = np.empty(q.shape)
        for i in range(len(q)):
            seen = slice(max(0, past + i + 1 - window) if window else 0, past + i + 1)
            for head in range(self.kv_heads):
                mine = slice(head * group, (head + 1) * group)
                cached = sequence.k[index][seen, head], sequence.v[index][seen, head]
                if generates and n_tip and past + i + 1 > int(layer["budget"]):
                    chosen = self._chosen(layer, queries[i, mine], cached[0])
                    cached = cached[0][chosen], cached[1][chosen]
                out[i, mine] = attend(queries[i, mine], *cached, scale) if len(cached[0]) else np.nan
        return out

    def _chosen(self, layer: Layer, q: Array, k: Array) -> Array:
        """The tokens that a KV head attends to; none where rounding may decide which is the last."""
        budget, sink, recent, n_tip = (int(layer[name]) for name in ("budget", "sink", "recent", "n_tip"))
        scores = importance(q, k, np.arange(2 * n_tip), float(layer["scale"]), "sum")
        chosen, more = (select(scores, count, sink, recent)[0] for count in (budget, budget + 1))
        (next_one,) = set(more) - set(chosen)
        by_score = chosen[(chosen >= sink) & (chosen < len(k) - recent)]
        clear = bool(scores[0, by_score].min() - scores[0, next_one] > CLEAR * np.abs(scores).max())
        self.choices.append(clear)
        return chosen if clear else chosen[:0]

    def _rotated(self, x: Tensor, norm: Tensor | None, past: int, eps: float) -> Array:
        """[tokens, heads, head_dim] as the kernels leave it, in the data type."""
        row = x.double().numpy()
        if norm is not None:
            row = self._rounded(row / np.sqrt((row**2).mean(axis=-1, keepdims=True) + eps))
            row = self._rounded(row * norm.double().numpy())
        share = x.shape[1] // self.kv_heads
        angle = (past + np.arange(len(row)))[:, None, None] * np.repeat(self.inv_freq, share, axis=0).astype(np.float64)
        cos, sin, scale = np.cos(angle), np.sin(angle), np.repeat(self.rope_scale, share, axis=0)
        even, odd = row[..., 0::2], row[..., 1::2]
        turned = np.stack([(even * cos - odd * sin) * scale, (odd * cos + even * sin) * scale], axis=-1)
        return self._rounded(turned.reshape(row.shape))

    def _rounded(self, x: Array) -> Array:
        return torch.from_numpy(x).to(self.dtype).double().numpy()
