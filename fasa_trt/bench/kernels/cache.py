"""The attention that is measured, Llama-3.1-8B's, and caches for it that are larger than the GPU's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Q_HEADS, KV_HEADS, HEAD_DIM = LLAMA_8B = (32, 8, 128)
SCALE = HEAD_DIM**-0.5
DTYPE, DEVICE = torch.bfloat16, "cuda"
TOKENS = 64  # of a block
ROTATED_BYTES = 2 << 30  # of keys and values in all copies together: their labels, too, exceed the L2 cache then
MAX_COPIES = 64
SPARE_BYTES = 4 << 30  # workspaces, labels, outputs


def cache_bytes(context: int, batch: int) -> int:
    """Of all keys and values of one layer."""
    return 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize * context * batch


def copies_of(context: int, batch: int, free: int) -> int:
    """Caches to take turns with; 0 where `free` bytes do not hold one. Some kernels want a cache laid out their own
    way, so there must be room for each of them twice."""
    one = cache_bytes(context, batch)
    wanted = max(2, min(MAX_COPIES, -(-ROTATED_BYTES // one)))
    return max(0, min(wanted, (free - SPARE_BYTES) // (2 * one)))


@dataclass(frozen=True)
class Paged:
    """One decode step of `batch` sequences of `context` tokens, over several caches that share a block table.

    q: [batch, q_heads, head_dim]. pools: each [blocks, 1, 2, kv_heads, TOKENS, head_dim], as TensorRT-LLM lays them
    out. table: int32 [batch, context / TOKENS], a permutation of the blocks. lengths: int32 [batch].
    """

    context: int
    batch: int
    q: Tensor
    pools: list[Tensor]
    table: Tensor
    lengths: Tensor

    @property
    def q_heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.pools[0].shape[3]

    @property
    def head_dim(self) -> int:
        return self.q.shape[2]

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [batch, 2, context / TOKENS], as `torch.ops.fasa` wants the table."""
        return torch.stack([2 * self.table, 2 * self.table + 1], dim=1).contiguous()

    def contiguous(self, pool: Tensor) -> Tensor:
        """[2, batch, kv_heads, context, head_dim]: a pool's keys and values, sequence by sequence to save memory."""
        shape = (2, self.batch, self.kv_heads, self.context, self.head_dim)
        out = torch.empty(shape, device=pool.device, dtype=pool.dtype)
        for sequence, blocks in enumerate(self.table):
            for kind in range(2):
                rows = pool[:, 0, kind].index_select(0, blocks)
                out[kind, sequence] = rows.transpose(0, 1).reshape(shape[2:])
        return out


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def make_paged(context: int, batch: int, copies: int, heads: tuple[int, int, int] = LLAMA_8B) -> Paged:
    """Random contents in shuffled blocks. heads: query heads, KV heads, head_dim. context: a multiple of TOKENS."""
    q_heads, kv_heads, head_dim = heads
    blocks = context // TOKENS
    return Paged(
        context=context,
        batch=batch,
        q=normal(batch, q_heads, head_dim),
        pools=[normal(batch * blocks, 1, 2, kv_heads, TOKENS, head_dim) for _ in range(copies)],
        table=torch.randperm(batch * blocks, device=DEVICE, dtype=torch.int32).view(batch, blocks),
        lengths=torch.full((batch,), context, device=DEVICE, dtype=torch.int32),
    )


def fitting(context: int, batch: int) -> Paged | None:
    """A step with as many copies as there is memory for; None, with a remark, where there is none for one."""
    torch.cuda.empty_cache()
    copies = copies_of(context, batch, torch.cuda.mem_get_info()[0])
    if not copies:
        print(f"{context:7d} x {batch:3d}: skipped, does not fit into this GPU's memory", flush=True)
        return None
    return make_paged(context, batch, copies)
