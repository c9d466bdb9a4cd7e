"""Paged caches filled with random keys and values, and what FASA should make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasa_trt.core.reference import attend, select
from fasa_trt.core.spec import SparseSpec

Array = NDArray[Any]


@dataclass
class Case:
    """One decode step of S sequences over a pool of shuffled blocks; see `fasa_trt.plugins.torch.ops`."""

    q: Tensor
    pool: Tensor
    offsets: Tensor
    lengths: Tensor
    labels: Tensor
    scales: Tensor
    kind: str
    n_tip: int
    max_length: int
    spec: SparseSpec
    softcap: float = 0.0
    layer: int = 0

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1]) ** -0.5

    def run(self) -> Tensor:
        from fasa_trt.plugins.torch.ops import decode

        return decode(
            self.q, self.pool, self.layer, self.offsets, self.lengths, self.labels, self.scales, self.kind, self.n_tip,
            self.max_length, self.spec.budget, self.spec.sink, self.spec.recent, self.scale, self.softcap,
            self.spec.reduction,
        )  # fmt: skip

    def with_spec(self, **changes: Any) -> Case:
        return replace(self, spec=replace(self.spec, **changes))

    def cached(self, seq: int, kind: int, kv_head: int) -> Tensor:
        """float64 [L, head_dim] of a sequence's keys (0) or values (1)."""
        length = int(self.lengths[seq])
        tokens = self.pool.shape[4]
        blocks = self.offsets[seq, kind, : -(-length // tokens)].long() // (2 * self.pool.shape[1])
        rows = self.pool[blocks, self.layer, kind, kv_head]
        return rows.reshape(-1, rows.shape[-1])[:length].double()

    def label_scores(self, seq: int, head_set: int) -> Tensor:
        """float64 [L]: scores of one token set, with labels and query quantised as fasa.h says."""
        heads, kv_heads = self.q.shape[1], self.pool.shape[3]
        group = heads // kv_heads
        per_head = self.spec.reduction == "per_head"
        kv_head = head_set // group if per_head else head_set
        mine = (
            self.q[seq, head_set : head_set + 1] if per_head else self.q[seq, kv_head * group : (kv_head + 1) * group]
        )
        query = torch.zeros(2 * self.n_tip, device=self.q.device)
        for row in mine.float():
            query += row[: 2 * self.n_tip]
        if self.kind == "prefix":
            return self.cached(seq, 0, kv_head)[:, : 2 * self.n_tip] @ query.double() * self.scale
        codes, scales = self.cached_labels(seq, kv_head)
        query_scale = query.abs().max().clamp(min=1e-20) / 127
        query_codes = (query / query_scale).round().clamp(-127, 127)
        return (codes.double() @ query_codes.double()) * scales.double() * query_scale.double() * self.scale

    def cached_labels(self, seq: int, kv_head: int) -> tuple[Tensor, Tensor]:
        """Label codes [L, 2 n_tip] and their scales [L]."""
        length, tokens = int(self.lengths[seq]), self.pool.shape[4]
        blocks = self.offsets[seq, 0, : -(-length // tokens)].long() // (2 * self.pool.shape[1])
        rows = self.labels[blocks, :, kv_head].reshape(-1, self.labels.shape[3])[:length]
        scales = self.scales[blocks, :, kv_head].reshape(-1)[:length]
        if self.kind == "int8":
            return rows[:, : 2 * self.n_tip].view(torch.int8), scales
        codes = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1)[:, : 2 * self.n_tip]
        return codes.to(torch.int8) - 8, scales

    def expected(self) -> tuple[Array, Array]:
        """float64 output [S, Hq, d], and the gap between the last chosen and the first rejected score of each head,
        relative to the largest score (infinite where nothing is rejected)."""
        seqs, heads, head_dim = self.q.shape
        kv_heads = self.pool.shape[3]
        group = heads // kv_heads
        out, gap = np.empty((seqs, heads, head_dim)), np.full((seqs, heads), np.inf)
        for s in range(seqs):
            for h in range(heads):
                kv_head = h // group
                k, v = (self.cached(s, kind, kv_head).cpu().numpy() for kind in (0, 1))
                q = self.q[s, h : h + 1].double().cpu().numpy()
                if len(k) > self.spec.budget:
                    scores = self.label_scores(s, h if self.spec.reduction == "per_head" else kv_head).cpu().numpy()
                    chosen = select(scores[None], self.spec.budget, self.spec.sink, self.spec.recent)[0]
                    rejected = np.setdiff1d(np.arange(len(k)), chosen)
                    free = chosen[(chosen >= self.spec.sink) & (chosen < len(k) - self.spec.recent)]
                    if len(free):
                        closest = scores[free].min() - scores[rejected].max()
                        gap[s, h] = closest / max(np.abs(scores).max(), 1e-30)
                    k, v = k[chosen], v[chosen]
                out[s, h] = attend(q, k, v, self.scale, self.softcap or None)[0]
        return out, gap


def make_case(
    lengths: list[int],
    *,
    kind: str = "int4",
    n_tip: int = 32,
    head_dim: int = 128,
    kv_heads: int = 2,
    group: int = 4,
    tokens: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    budget: int = 256,
    sink: int = 4,
    recent: int = 32,
    reduction: str = "sum",
    softcap: float = 0.0,
    layers: int = 1,
    layer: int = 0,
    spare_blocks: int = 3,
    max_length: int | None = None,
    seed: int = 0,
    device: str = "cuda",
) -> Case:
    """Random contents, written by `fasa::append` with rotation switched off, in shuffled blocks of a larger pool."""
    from fasa_trt.plugins.torch.ops import append

    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    longest = max_length or max(lengths)
    columns = -(-longest // tokens)
    used = [-(-length // tokens) for length in lengths]
    total = sum(used) + spare_blocks
    pool = torch.full((total, layers, 2, kv_heads, tokens, head_dim), float("nan"), device=device, dtype=dtype)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    offsets = torch.full((len(lengths), 2, columns), 0x7FFFFFF, dtype=torch.int32)
    for s, count in enumerate(used):
        for b in range(count):
            block = order.pop()
            offsets[s, 0, b], offsets[s, 1, b] = block * layers * 2, block * layers * 2 + 1
    offsets = offsets.to(device)
    width = {"prefix": 0, "int4": n_tip, "int8": 2 * n_tip}[kind]
    labels = torch.zeros((total, tokens, kv_heads, width), dtype=torch.uint8, device=device)
    scales = torch.zeros((total, tokens, kv_heads), dtype=torch.float16, device=device)
    still = torch.zeros((kv_heads, head_dim // 2), device=device)
    for s, length in enumerate(lengths):
        rows = torch.full((length,), s, dtype=torch.int32, device=device)
        position = torch.arange(length, dtype=torch.int32, device=device)
        spread = torch.exp(torch.randn(head_dim, generator=generator, device=device) * 0.7).to(dtype)  # uneven dims
        append(
            normal(length, kv_heads * group, head_dim), normal(length, kv_heads, head_dim) * spread,
            normal(length, kv_heads, head_dim), rows, position, still, torch.ones_like(still), pool, layer, offsets,
            labels, scales, kind, n_tip,
        )  # fmt: skip
    spec = SparseSpec(budget=budget, n_tip=n_tip, reduction=reduction, sink=sink, recent=recent)  # type: ignore[arg-type]
    return Case(
        q=normal(len(lengths), kv_heads * group, head_dim),
        pool=pool,
        offsets=offsets,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        labels=labels,
        scales=scales,
        kind=kind,
        n_tip=n_tip,
        max_length=longest,
        spec=spec,
        softcap=softcap,
        layer=layer,
    )
