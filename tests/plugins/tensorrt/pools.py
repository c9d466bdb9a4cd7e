"""The part of TensorRT-LLM's runtime that owns memory: pools of blocks, who has which, and the bindings that say so."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.reference import Array
from tests.plugins.tensorrt.driver import Layer

MAX_BLOCKS, WILD = 64, 0x7FFFFFF  # columns of the offsets, and what those past a sequence's last block hold


@dataclass
class Cached:
    """One sequence: its tokens and, for each pool, its blocks."""

    length: int = 0
    blocks: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Who is in a step: the first `contexts` sequences with a chunk of `counts` tokens, the others with one. The
    bindings are those from sequence_length on, in the plugin's order."""

    names: Sequence[str]
    counts: Sequence[int]
    contexts: int
    bindings: Sequence[Tensor]


class Pools:
    """Shuffled blocks [blocks, layers, 2, heads, tokens, head_dim] that hold NaN until they are written.

    mapping: the pool of each layer, and which layer of that pool it is. A layer with quantised labels has one head more
    in its pool, so it shares it with layers like itself.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        mapping: Sequence[tuple[int, int]],
        *,
        layers_of_pool: int,
        dtype: torch.dtype,
        device: str,
        blocks: int = 128,
    ) -> None:
        self.layers, self.mapping, self.layers_of_pool, self.device = layers, mapping, layers_of_pool, device
        self.kv_heads, self.tokens, head_dim = (
            int(layers[0][name]) for name in ("num_kv_heads", "tokens_per_block", "head_dim")
        )
        self.data, self.free = [], []
        for pool in range(max(pool for pool, _ in mapping) + 1):
            (extra,) = {
                bool(layer["label_kind"]) for layer, (mine, _) in zip(layers, mapping, strict=True) if mine == pool
            }
            shape = (blocks, layers_of_pool, 2, self.kv_heads + extra, self.tokens, head_dim)
            self.data.append(torch.full(shape, float("nan"), dtype=dtype, device=device))
            self.free.append(random.Random(pool).sample(range(blocks), blocks))
        self.sequences: dict[str, Cached] = {}

    def leave(self, name: str) -> None:
        for pool, blocks in enumerate(self.sequences.pop(name).blocks):
            self.free[pool] += blocks
            self.data[pool][blocks] = float("nan")

    def grow(self, name: str, count: int) -> None:
        sequence = self.sequences.setdefault(name, Cached(blocks=[[] for _ in self.data]))
        sequence.length += count
        for pool, blocks in enumerate(sequence.blocks):
            while len(blocks) * self.tokens < sequence.length:
                blocks.append(self.free[pool].pop(0))

    def step(self, names: Sequence[str], counts: Sequence[int], contexts: int) -> Step:
        """Makes room for the tokens of a step."""
        for name, count in zip(names, counts, strict=True):
            self.grow(name, count)
        lengths = [self.sequences[name].length for name in names]
        context = [*counts[:contexts], *[5] * (len(names) - contexts)]  # of generating ones: of the prompt, unused
        past = [*lengths[:contexts], *(length - 1 for length in lengths[contexts:])]
        types = [0] * contexts + [1] * (len(names) - contexts)
        ints = [torch.tensor(values, dtype=torch.int32) for values in (lengths, context, context, types, past)]
        on_device = [x.to(self.device) for x in (*ints[:2], self._offsets(names))]
        pointers = torch.tensor([[data.data_ptr(), 0] for data in self.data])
        mapping = torch.tensor(self.mapping, dtype=torch.int32)
        return Step(names, counts, contexts, [*on_device[:2], *ints[2:], on_device[2], pointers, mapping])

    def _offsets(self, names: Sequence[str]) -> Tensor:
        offsets = torch.full((len(self.data), len(names), 2, MAX_BLOCKS), WILD, dtype=torch.int32)
        for row, name in enumerate(names):
            for pool, blocks in enumerate(self.sequences[name].blocks):
                first = torch.tensor(blocks, dtype=torch.int32) * self.layers_of_pool * 2
                offsets[pool, row, 0, : len(blocks)], offsets[pool, row, 1, : len(blocks)] = first, first + 1
        return offsets

    def cached(self, index: int, name: str) -> tuple[Array, Array]:
        """float64 [length, kv_heads, head_dim]: the keys and the values that a layer has of a sequence."""
        keys, values = (self._rows(index, name, kind)[:, : self.kv_heads].double().numpy() for kind in (0, 1))
        return keys, values

    def labels(self, index: int, name: str) -> tuple[Array, Array]:
        """uint8 [length, row bytes] and float16 [length, kv_heads]: a sequence's rows of the label head."""
        codes, scales = (self._rows(index, name, kind)[:, self.kv_heads].contiguous() for kind in (0, 1))
        found: Array = codes.view(torch.uint8).numpy()
        return found, scales.view(torch.float16).numpy()[:, : self.kv_heads].astype(np.float16)

    def _rows(self, index: int, name: str, kind: int) -> Tensor:
        """[length, heads of the pool, head_dim], on the host."""
        (pool, layer), sequence = self.mapping[index], self.sequences[name]
        blocks = torch.tensor(sequence.blocks[pool], device=self.device)
        rows = self.data[pool][blocks, layer, kind].transpose(1, 2).flatten(0, 1)
        return rows[: sequence.length].cpu()
